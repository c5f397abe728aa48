"""What runs on the head node after a stage's training: in the driver where that is there, else as a pinned task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import ray

from raycomp.config import JobConfig
from raycomp.distributed.cluster import head_node_options, on_head_node
from raycomp.distributed.run_store import RunStore, here
from raycomp.errors import RaycompError
from raycomp.pipeline.build import ResolvedStage
from raycomp.pipeline.ending.conclude import Conclusion, RunFacts, conclude
from raycomp.pipeline.ending.load import stored_conclusion
from raycomp.pipeline.ending.outcome import StageOutcome, load_outcome, save_outcome
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.stage import finish_stage, resolve_start
from raycomp.pipeline.task import Task
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.storage import MANIFEST, open_artifact, publish

Result = TypeVar("Result")


@dataclass(frozen=True)
class HeadOrder:
    """What the head node must know.

    Args:
        job: the job.
        base_dir: what the task's path is relative to.
        run_store: where the run's files are.
        resolved: what the stage's config lists mean for the model that it starts from.
        checkpoint: the path of the stage's committed checkpoint, within the storage's filesystem.
    """

    job: JobConfig
    base_dir: str
    run_store: RunStore
    resolved: ResolvedStage
    checkpoint: str

    def task(self) -> Task:
        """The user's task, with what it prepared."""
        return build_task(self.job.task, here(self.base_dir), self.run_store.fetch_prepared())

    def state(self) -> StageState:
        """The stage's committed checkpoint."""
        return StageState.load(self.run_store.fetch_path(self.checkpoint))


def on_head(function: Callable[..., Result], *args: Any) -> Result:
    """Runs `function(*args)` on the head node.

    Raises:
        RaycompError: as the function raised it, also where it ran in a task.
    """
    if on_head_node():
        return function(*args)
    try:
        return ray.get(ray.remote(**head_node_options())(function).remote(*args))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaycompError):
            raise error.cause from None
        raise


def resolve_next(job: JobConfig, base_dir: str, run_store: RunStore, index: int) -> ResolvedStage:
    """What a later stage's config lists mean for the model that the stages before it left."""
    task = build_task(job.task, here(base_dir), run_store.fetch_prepared())
    return resolve_start(job, index, task, run_store.fetch_start(index))


def end_stage(order: HeadOrder, index: int) -> None:
    """Finishes a stage that isn't the last, and stores where the next one starts."""
    state = order.state()
    start = order.run_store.fetch_start(index)
    result = finish_stage(order.job, index, order.task(), start, order.resolved, state)
    with TemporaryDirectory() as folder:
        save_outcome(Path(folder), StageOutcome.of(result, state), result)
        order.run_store.upload(f"stages/{index}", Path(folder))


def publish_run(order: HeadOrder, facts: RunFacts) -> Conclusion:
    """Finishes the last stage and publishes the artifact: it is there whole, or not at all.

    A run that died between publishing and its record is found published.
    """
    job, run_store = order.job, order.run_store
    if run_store.artifacts.join(facts.run).exists(MANIFEST):
        return stored_conclusion(open_artifact(run_store.artifact_uri))
    last = len(job.stages) - 1
    earlier = [
        (*load_outcome(run_store.fetch(f"stages/{index}")), run_store.fetch_start(index).plan) for index in range(last)
    ]
    with TemporaryDirectory() as folder:
        files = Path(folder)
        conclusion = conclude(
            job, order.task(), run_store.fetch_start(last), order.resolved, order.state(), earlier, facts, files
        )
        summary = conclusion.summary
        fields = {
            "job": job.name,
            "run": facts.run,
            "created": facts.created,
            "lineage": {"config_digest": job.digest(), "task": job.task.entrypoint},
            "versions": summary.environment,
            "figures": summary.figures(),
        }
        publish(run_store.artifacts, facts.run, files, fields)
    return conclusion
