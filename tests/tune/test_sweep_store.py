"""Where a sweep keeps its files, and which sweep a resumed one goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycomp.config.sweep_plan import SweepPlan, parse_sweep
from raycomp.results.summary import TrialFigures
from raycomp.tune.sweep_store import SweepRecord, SweepStore, sweeps_of, unfinished_sweep
from tests.tune.jobs import RATIO, tiny_job


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    return parse_sweep({"job": tiny_job(tmp_path), "search": {RATIO: {"grid": [0.25, 0.5]}}}, tmp_path)


def begun(plan: SweepPlan, sweep: str) -> SweepStore:
    sweep_store = SweepStore(sweeps_of(plan.job).join(sweep).uri)
    sweep_store.write_record(SweepRecord(sweep, plan.digest(), "2030-01-01T00:00:00+00:00", ("00", "01")))
    return sweep_store


def test_each_trial_has_a_name_and_a_storage_of_its_own(plan: SweepPlan, tmp_path: Path) -> None:
    sweep_store = begun(plan, "one")
    jobs = [sweep_store.job_of(trial) for trial in plan.trials]
    assert [job.name for job in jobs] == ["tiny-00", "tiny-01"]
    assert {job.storage.uri for job in jobs} == {str(tmp_path / "stored/tiny/sweeps/one/jobs")}
    assert jobs[0].stages == plan.trials[0].job.stages


def test_a_long_name_is_cut_to_what_a_name_may_have(tmp_path: Path) -> None:
    job = {**tiny_job(tmp_path), "name": "n" * 63}
    plan = parse_sweep({"job": job, "search": {RATIO: {"grid": [0.25]}}}, tmp_path)
    assert begun(plan, "one").job_of(plan.trials[0]).name == "n" * 60 + "-00"


def test_rows_come_back(plan: SweepPlan) -> None:
    sweep_store = begun(plan, "one")
    row = TrialFigures("00", {RATIO: 0.25}, 0.5, 100, 2000, artifact_uri="somewhere")
    assert sweep_store.read_row("00") is None
    sweep_store.write_row(row)
    assert sweep_store.read_row("00") == row
    assert sweep_store.done(("00", "01")) == {"00"}
    sweep_store.forget(["00", "01"])
    assert sweep_store.read_row("00") is None


def test_the_latest_equal_sweep_with_something_to_do_is_unfinished(plan: SweepPlan, tmp_path: Path) -> None:
    assert unfinished_sweep(plan, print) is None
    for sweep in ("20300101", "20300102", "20300103"):
        begun(plan, sweep)
    last = begun(plan, "20300103")
    for trial in ("00", "01"):
        last.write_row(TrialFigures(trial, {}, 0.5, 100))
    begun(plan, "20300102").write_row(TrialFigures("00", {}, None, None, error="it failed"))
    found = unfinished_sweep(plan, print)
    assert found is not None and found[0].uri.endswith("20300102")
    other = parse_sweep({"job": tiny_job(tmp_path), "search": {RATIO: {"grid": [0.25, 0.6]}}}, tmp_path)
    assert unfinished_sweep(other, print) is None


def test_a_damaged_sweep_is_told_and_passed_over(plan: SweepPlan) -> None:
    begun(plan, "20300101")
    begun(plan, "20300102").store.write_bytes("sweep.json", b"{")
    told: list[str] = []
    found = unfinished_sweep(plan, told.append)
    assert found is not None and found[0].uri.endswith("20300101")
    (line,) = told
    assert "sweep 20300102 can't be resumed" in line and "sweep.json" in line


def test_a_trial_whose_row_is_damaged_is_run_again(plan: SweepPlan) -> None:
    sweep_store = begun(plan, "20300101")
    for trial in ("00", "01"):
        sweep_store.write_row(TrialFigures(trial, {}, 0.5, 100))
    sweep_store.store.write_bytes("rows/01.json", b"{")
    assert sweep_store.done(("00", "01")) == {"00"}
    assert unfinished_sweep(plan, print) is not None


def test_a_sweep_is_found_by_what_decides_its_results(plan: SweepPlan, tmp_path: Path) -> None:
    begun(plan, "20300101")
    job = tiny_job(tmp_path) | {"scaling": {"max_failures": 9}, "cluster": {"num_cpus": 2}}
    patient = parse_sweep({"job": job, "search": plan.config.model_dump(mode="json")["search"]}, tmp_path)
    assert unfinished_sweep(patient, print) is not None
