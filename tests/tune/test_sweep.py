"""One real sweep on a local Ray: good trials, a failing one, and a second sweep that goes on with what is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console

import raycomp
from raycomp.errors import TaskError
from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import TrialFigures
from raycomp.tune import SweepResult, sweep
from tests.tune.jobs import RATIO, tiny_job

pytestmark = pytest.mark.cluster


class Heard:
    """Keeps what a sweep says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, line: str) -> None:
        self.lines.append(line)

    def event(self, event: ProgressEvent) -> None:
        raise AssertionError("a sweep hands on no events of its trials")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def result(folder: Path, heard: Heard) -> Iterator[SweepResult]:
    search = {RATIO: {"grid": [0.25, 0.5]}, "task.arguments.fault": {"choice": [None, "raise"]}}
    settings = {"job": tiny_job(folder), "search": search, "num_samples": 2, "seed": 2, "max_concurrent_trials": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        yield sweep(settings, folder, progress=heard)


def by_settings(result: SweepResult) -> dict[tuple[object, ...], TrialFigures]:
    return {tuple(row.settings.values()): row for row in result.rows}


def test_every_trial_has_its_row(result: SweepResult) -> None:
    assert set(by_settings(result)) == {(0.25, None), (0.5, None), (0.5, "raise")}
    assert result.metric == "accuracy"
    assert not ray.is_initialized()


def test_fewer_channels_give_fewer_macs(result: SweepResult) -> None:
    rows = by_settings(result)
    quarter, half = rows[0.25, None], rows[0.5, None]
    # 3 x 3 weights at 6 x 6 positions and 36 x 2 weights of the linear layer, for 6 and 4 channels that are left.
    assert quarter.macs == 6 * (9 * 36 + 36 * 2)
    assert half.macs == 4 * (9 * 36 + 36 * 2)
    assert half.on_front
    assert quarter.on_front == (quarter.metric > half.metric)
    assert quarter.file_bytes > half.file_bytes
    assert result.front[0] == half


def test_artifacts_load(result: SweepResult) -> None:
    for ratio, channels in ((0.25, 6), (0.5, 4)):
        model = raycomp.load(by_settings(result)[ratio, None].artifact_uri)
        assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 2)
        assert next(iter(model.state_dict().values())).shape[0] == channels


def test_a_failed_trial_has_its_cause_in_one_line(result: SweepResult) -> None:
    (failed,) = result.failed
    assert "ValueError: the labels are gone" in failed.error
    assert "\n" not in failed.error
    assert (failed.metric, failed.macs, failed.artifact_uri, failed.on_front) == (None, None, "", False)


def test_table_report_and_rows_are_there(result: SweepResult) -> None:
    console = Console(file=StringIO(), width=250)
    console.print(result.table())
    text = console.file.getvalue()
    assert "★" in text and "the labels are gone" in text
    assert "the labels are gone" in Path(result.report_path).read_text()
    rows = json.loads((Path(result.uri) / "trials.json").read_text())
    assert [row["metric"] for row in rows] == [row.metric for row in result.rows]


def test_the_driver_hears_of_each_trial(result: SweepResult, heard: Heard) -> None:
    assert "checking the first trial's job" in heard.lines[0] and "3 trials" in heard.lines[1]
    for row in result.rows:
        assert any(line.startswith(f"trial {row.trial} begins: sparse_ratio ") for line in heard.lines)
    assert any("failed: " in line and "the labels are gone" in line for line in heard.lines)


def test_what_is_wrong_with_the_task_is_said_before_ray_is_started(folder: Path, result: SweepResult) -> None:
    job = {**tiny_job(folder), "task": {"entrypoint": "tiny.py:Tinny"}}
    with pytest.raises(TaskError, match="Tinny"):
        sweep({"job": job, "search": {RATIO: {"grid": [0.25]}}}, folder)
    assert not ray.is_initialized()
