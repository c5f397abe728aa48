"""One trial: a distributed compression job within a Ray Tune trial, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raycomp.config import JobConfig, nearest
from raycomp.distributed.job import CompressionJob, JobResult
from raycomp.distributed.task_recipe import TaskRecipe
from raycomp.errors import RaycompError
from raycomp.results.summary import TrialFigures
from raycomp.tune.sweep_store import SweepStore

FAILED = "failed"


@dataclass(frozen=True)
class TrialOrder:
    """What a trial must know.

    Args:
        trial: its id.
        settings: searched key → value.
        job: the job with these values, named and placed for this trial.
        recipe: makes the task.
        metric: the metric to compare; None for the task's first.
        sweep_store: where the sweep's files are.
    """

    trial: str
    settings: dict[str, JsonValue]
    job: JobConfig
    recipe: TaskRecipe
    metric: str | None
    sweep_store: SweepStore


def run_trial(config: Mapping[str, Any], orders: Mapping[str, TrialOrder]) -> None:
    """The function that Ray Tune runs: one job, with its row stored at the end.

    A job that fails is a trial that ends with a cause. A lost process or node is left to Ray Tune, which starts the
    trial again; its job then goes on from its last checkpoint.

    Args:
        config: {"trial": {"id": the trial's id, …}}.
        orders: trial id → order.
    """
    order = orders[config["trial"]["id"]]
    row, metrics = _run(order)
    order.sweep_store.write_row(row)
    tune.report({**metrics, "macs": row.macs, "file_bytes": row.file_bytes, FAILED: row.error})


def _run(order: TrialOrder) -> tuple[TrialFigures, dict[str, float]]:
    try:
        job = CompressionJob(order.job, order.recipe.base_dir, task=order.recipe.given())
        result = job.fit(resume=True, callbacks=[TuneReportCallback()])
    except Exception as error:
        return TrialFigures(order.trial, order.settings, None, None, error=one_line(error)), {}
    return trial_figures(order, result), result.summary.models[-1].metrics


def trial_figures(order: TrialOrder, result: JobResult) -> TrialFigures:
    """The row of a job that ended: the figures of its last form, int8 where there is one."""
    final = result.summary.models[-1]
    name = order.metric or next(iter(final.metrics), "")
    value = final.metrics.get(name)
    error = ""
    if not final.metrics:
        error = "the final model could not be evaluated; its report says why"
    elif value is None:
        error = f"the task gives no metric '{name}' ({nearest(name, final.metrics)})"
    elif not math.isfinite(value):
        value, error = None, f"{name} is {value}"
    return TrialFigures(
        order.trial,
        order.settings,
        value,
        final.macs,
        final.file_bytes,
        artifact_uri=result.artifact_uri,
        error=error,
    )


def one_line(error: BaseException) -> str:
    """An error's cause in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RaycompError):
        return "; ".join(lines) or type(error).__name__
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
