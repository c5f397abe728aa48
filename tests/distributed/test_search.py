"""Searches and budgets of latency in whole jobs on a real Ray: any number of judges, and interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from raycomp import CompressionJob
from raycomp.config import parse_job
from raycomp.distributed import search
from raycomp.distributed.job import JobResult
from raycomp.distributed.records import write_record
from raycomp.pipeline import latency
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.search import search_stage
from raycomp.pipeline.stage import StageStart, resolve_start
from raycomp.speedup.graph.macs import count_macs
from raycomp.storage import open_artifact
from tests.contracts import tiny
from tests.distributed.conftest import ROOT

pytestmark = pytest.mark.cluster

_ENTRIES = [{"op_types": ["Conv2d"], "budget": {"macs": 0.6}}]
_L1 = {"type": "L1NormPruner", "config_list": _ENTRIES}
ANNEALING = {"type": "SimulatedAnnealingPruner", "pruner": _L1, "cool_down_rate": 0.5, "candidates": 3, "seed": 4}


def _job(storage: Path, workers: int, *compressors: dict[str, Any]) -> dict[str, Any]:
    job = tiny.job(*compressors, steps=2)
    return {**job, "storage": {"uri": str(storage)}, "scaling": {"num_workers": workers}}


def _fit(job: dict[str, Any], **options: Any) -> JobResult:
    return CompressionJob(job, base_dir=ROOT).fit(**options)


@pytest.fixture(scope="module")
def two(local_ray: str, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    return _fit(_job(tmp_path_factory.mktemp("two"), 2, ANNEALING))


def test_the_number_of_judges_changes_nothing(two: JobResult) -> None:
    """Nor whether they are Ray's actors at all: this process finds the same by itself."""
    config = parse_job(_job(Path(), 1, ANNEALING))
    task = build_task(config.task)
    _, (alone,) = search_stage(config, 0, task, StageStart(), resolve_start(config, 0, task, StageStart()))
    (found,) = two.summary.searches
    assert found == alone
    assert found.judged == 1 + 3 * 3
    assert found.best >= found.first


def test_what_was_found_is_in_the_artifact_and_can_be_used_again(two: JobResult, tmp_path: Path) -> None:
    stored = yaml.safe_load(open_artifact(two.artifact_uri).store.read_bytes("searched.yaml"))
    assert stored[0]["stage"] == "fused"
    again = parse_job(_job(tmp_path, 1, {"type": "L1NormPruner", "config_list": stored[0]["config_list"]}))
    entries = again.stages[0].compressors[0].config_list  # type: ignore[attr-defined]
    parts = {name: entry.sparse_ratio for entry in entries for name in entry.op_names if entry.sparse_ratio is not None}
    assert {name: 1 - float(two.masks[name]["weight"].mean()) for name in parts} == pytest.approx(parts)
    assert set(parts) == {"conv", "conv1", "conv2"}


def test_the_budget_is_met_behind_speedup(two: JobResult) -> None:
    macs = {row.name: row.macs for row in two.summary.models}
    assert macs["sped-up"] is not None and macs["dense"] is not None
    assert 0.4 < macs["sped-up"] / macs["dense"] <= 0.6


def test_a_search_goes_on_where_it_was(
    local_ray: str, two: JobResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    write, records = write_record, list[int]()

    def dies(store: Any, name: str, adapter: TypeAdapter[Any], record: Any) -> None:
        write(store, name, adapter, record)
        records.append(len(record.rounds))
        if records == [1, 2]:
            raise Killed

    monkeypatch.setattr(search, "write_record", dies)
    with pytest.raises(Killed):
        _fit(_job(tmp_path, 2, ANNEALING))
    resumed = _fit(_job(tmp_path, 1, ANNEALING), resume=True)
    assert resumed.summary.searches == two.summary.searches
    # Two rounds were judged before, two after; the last record holds what was found.
    assert records == [1, 2, 3, 4, 4]


def test_a_latency_is_met_on_the_head_node(local_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that takes as long as the model has multiply-accumulates: what is timed can be told beforehand."""
    monkeypatch.setattr(latency._Study, "_runnable", lambda study, model, path: model)
    monkeypatch.setattr(
        latency,
        "latencies_s",
        lambda models, example, *_, **__: {name: count_macs(model, example) for name, model in models.items()},
    )
    entries = [{"op_types": ["Conv2d"], "budget": {"latency": 0.5}}]
    job = _job(tmp_path, 1, {"type": "TaylorPruner", "config_list": entries, "training_steps": 1})
    result = _fit(job)
    macs = {row.name: row.macs for row in result.summary.models}
    assert macs["sped-up"] is not None and macs["dense"] is not None
    assert macs["sped-up"] / macs["dense"] == pytest.approx(0.5, abs=0.06)
    (told,) = [warning for warning in result.summary.warnings if "a latency of 0.500" in warning]
    assert f"timed {macs['sped-up'] / macs['dense']:.3f}" in told
