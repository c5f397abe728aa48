"""What runs on the head node after a stage's training: in the driver where that is there, else as a pinned task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from raycomp.config import JobConfig
from raycomp.core.masks import Masks
from raycomp.distributed.run_store import RunStore
from raycomp.distributed.search import found_by_searches
from raycomp.distributed.task_recipe import TaskRecipe
from raycomp.errors import ArtifactError
from raycomp.pipeline.build import ResolvedStage
from raycomp.pipeline.earlier import standing_in
from raycomp.pipeline.ending.conclude import Conclusion, RunFacts, conclude
from raycomp.pipeline.ending.figures import with_metric
from raycomp.pipeline.ending.load import stored_conclusion
from raycomp.pipeline.ending.outcome import StageOutcome, load_outcome, save_outcome
from raycomp.pipeline.stage import finish_stage, resolve_start
from raycomp.pipeline.task import Task, data_made_once
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.speedup import Plan
from raycomp.storage import MANIFEST, open_artifact, publish, scratch


@dataclass(frozen=True)
class HeadOrder:
    """What the head node must know.

    Args:
        job: the job.
        recipe: makes the task.
        run_store: where the run's files are.
        resolved: what the stage's config lists mean for the model that it starts from.
        index: the stage's.
        notes: what happened to the stage's training, for the report.
    """

    job: JobConfig
    recipe: TaskRecipe
    run_store: RunStore
    resolved: ResolvedStage
    index: int
    notes: tuple[str, ...] = ()

    def task(self, folder: Path) -> Task:
        """The user's task, with what it prepared; `folder` must stay as long as the task."""
        return self.recipe.make(self.job.task, self.run_store.fetch_prepared(folder))

    def state(self) -> StageState:
        """The stage's last checkpoint.

        Raises:
            StorageError: there is none that is whole.
        """
        stage = self.job.stages[self.index].name
        state, _ = self.run_store.last_state(stage)
        if state is None:
            raise ArtifactError(
                "the training left no checkpoint that is whole",
                where=self.run_store.train.join(stage).uri,
                remedy="run again with --resume: the stage is trained again",
            )
        return replace(state, notes=tuple(dict.fromkeys([*state.notes, *self.notes])))


def resolve_next(job: JobConfig, recipe: TaskRecipe, run_store: RunStore, index: int) -> ResolvedStage:
    """What a later stage's config lists mean for the model that the stages before it left."""
    with scratch() as folder:
        task = recipe.make(job.task, run_store.fetch_prepared(folder))
        return resolve_start(job, index, task, run_store.fetch_start(index))


def end_stage(order: HeadOrder) -> None:
    """Finishes a stage that isn't the last, and stores where the next one starts."""
    state, index = order.state(), order.index
    start = order.run_store.fetch_start(index)
    with scratch() as folder, data_made_once(), standing_in() as told:
        task = order.task(folder / "task")
        result = with_metric(order.job, task, index, finish_stage(order.job, index, task, start, order.resolved, state))
        result = replace(result, notes=(*result.notes, *told))
        save_outcome(folder / "outcome", StageOutcome.of(result, state), result)
        order.run_store.upload(f"stages/{index}", folder / "outcome")


def publish_run(order: HeadOrder, facts: RunFacts) -> Conclusion:
    """Finishes the last stage and publishes the artifact: it is there whole, or not at all.

    A run that died between publishing and its record is found published.
    """
    job, run_store = order.job, order.run_store
    if run_store.artifacts.join(facts.run).exists(MANIFEST):
        return stored_conclusion(open_artifact(run_store.artifact_uri))
    with scratch() as folder, data_made_once():
        files = folder / "artifact"
        files.mkdir()
        conclusion = conclude(
            job,
            order.task(folder / "task"),
            run_store.fetch_start(order.index),
            order.resolved,
            order.state(),
            [_earlier(run_store, index) for index in range(order.index)],
            replace(facts, searches=found_by_searches(job, run_store)),
            files,
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


def _earlier(run_store: RunStore, index: int) -> tuple[StageOutcome, Masks, Plan]:
    """A stage before the last: its outcome and masks, and the surgery done before it."""
    with scratch() as folder:
        return (*load_outcome(run_store.fetch(f"stages/{index}", folder)), run_store.fetch_start(index).plan)
