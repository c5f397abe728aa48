"""What is told of a trial: its row, its cause of failure, and lines for the driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycomp.config import parse_job
from raycomp.distributed.job import JobResult
from raycomp.distributed.task_recipe import TaskRecipe
from raycomp.errors import ConfigError, Problem, TaskError
from raycomp.results.summary import ModelFigures, RunSummary
from raycomp.tune.events import last_error
from raycomp.tune.sweep_store import SweepStore
from raycomp.tune.trial import TrialOrder, one_line, trial_figures
from tests.tune.jobs import tiny_job


def order(folder: Path, metric: str | None = None) -> TrialOrder:
    return TrialOrder(
        "03", {"training.seed": 1}, parse_job(tiny_job(folder)), TaskRecipe("."), metric, SweepStore(str(folder))
    )


def result(value: float = 0.75) -> JobResult:
    models = (
        ModelFigures("dense", {"accuracy": 0.9, "loss": 0.1}, 10, 400, 4000),
        ModelFigures("int8", {"accuracy": value, "loss": 0.3}, 10, 100, 1000),
    )
    return JobResult(RunSummary("tiny", "run", "2030", models), "the-artifact", "the-report", {}, {})


def test_the_row_holds_the_last_forms_figures(tmp_path: Path) -> None:
    row = trial_figures(order(tmp_path), result())
    assert (row.trial, row.settings, row.metric, row.macs, row.file_bytes) == (
        "03",
        {"training.seed": 1},
        0.75,
        100,
        1000,
    )
    assert (row.artifact_uri, row.error) == ("the-artifact", "")
    assert trial_figures(order(tmp_path, "loss"), result()).metric == 0.3


def test_a_metric_that_the_task_lacks_is_named(tmp_path: Path) -> None:
    row = trial_figures(order(tmp_path, "acuracy"), result())
    assert row.metric is None
    assert row.error == "the task gives no metric 'acuracy' (did you mean 'accuracy'?)"
    assert row.artifact_uri == "the-artifact"


def test_a_metric_that_is_no_number_fails_the_trial(tmp_path: Path) -> None:
    row = trial_figures(order(tmp_path), result(float("nan")))
    assert (row.metric, row.error) == (None, "accuracy is nan")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TaskError("it raised\nValueError: no", where="task.py:3"), "task.py:3: it raised; ValueError: no"),
        (ConfigError([Problem("a", "x"), Problem("b", "y", "z")]), "a: x; b: y (z)"),
        (KeyError("k"), "KeyError: 'k'"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_cause_is_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_the_cause_of_the_last_failure() -> None:
    lost = """\
Failure # 1 (occurred at 2030-01-01_00-00-00)
ray::ImplicitFunc.train() (pid=12)
  File "trial.py", line 3, in run_trial
    raise error
raycomp.errors.StorageError: s3://b/x: it can't be reached
Failure # 2 (occurred at 2030-01-01_00-01-00)
The actor died unexpectedly before finishing this task.
	class_name: ImplicitFunc
	pid: 321
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR
"""
    assert last_error(lost) == "The actor died unexpectedly before finishing this task."
    raised = lost[: lost.index("Failure # 2")]
    assert last_error(raised) == "raycomp.errors.StorageError: s3://b/x: it can't be reached"
    assert last_error("") == "its process was lost"
