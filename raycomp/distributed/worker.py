"""What a Ray Train worker runs: one stage's training, with progress and checkpoints reported through Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle

from raycomp.config import JobConfig
from raycomp.distributed.run_store import RunStore
from raycomp.distributed.task_recipe import TaskRecipe
from raycomp.pipeline.build import ResolvedStage
from raycomp.pipeline.stage import stage_chain
from raycomp.pipeline.task import data_made_once
from raycomp.pipeline.training.batch_norm import synchronise_batch_norm_
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.training.loop import StageTraining
from raycomp.results.progress import ProgressEvent
from raycomp.storage import scratch
from raycomp.storage.explain import explained


@dataclass(frozen=True)
class WorkerOrder:
    """What the driver tells its workers.

    Args:
        job: the job.
        index: the stage's.
        run_store: where the run's files are.
        resolved: what the stage's config lists mean for the model that it starts from.
        recipe: makes the task.
        sink: the actor that hears of progress.
        started: `time.time()` when the run began.
    """

    job: JobConfig
    index: int
    run_store: RunStore
    resolved: ResolvedStage
    recipe: TaskRecipe
    sink: ActorHandle
    started: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is in storage: where the training stood."""

    stage: str
    epoch: int


News = ProgressEvent | Saved | str
"""What the driver hears: where training stands, what is saved, and what is to be told."""


class _RayListener:
    """Progress goes to the driver's actor at once, checkpoints through Ray Train."""

    def __init__(self, sink: ActorHandle, run_store: RunStore) -> None:
        self._sink, self._run_store = sink, run_store

    def progress(self, event: ProgressEvent) -> None:
        self._sink.push.remote(event)

    def checkpoint(self, make: Callable[[], StageState], metrics: dict[str, float]) -> None:
        if ray.train.get_context().get_world_rank() != 0:
            ray.train.report(dict(metrics))
            return
        state = make()
        self._run_store.require()
        with scratch() as folder, explained(self._run_store.train.uri):
            state.save(folder)
            ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._sink.push.remote(Saved(state.stage, state.epoch))


def train_loop(config: Mapping[str, Any]) -> None:
    """The loop that `TorchTrainer` runs on every worker.

    Args:
        config: {"order": a WorkerOrder}.
    """
    order: WorkerOrder = config["order"]
    with scratch() as folder, data_made_once():
        _train(order, folder)


def _train(order: WorkerOrder, folder: Path) -> None:
    job = order.job
    stage = job.stages[order.index]
    training = job.training_for(stage)
    torch.set_num_threads(job.scaling.threads_per_worker)
    device = ray.train.torch.get_device()
    task = order.recipe.make(job.task, order.run_store.fetch_prepared(folder))
    prepare = synchronise_batch_norm_ if training.sync_batch_norm else None
    start = order.run_store.fetch_start(order.index)
    chain = stage_chain(job, order.index, task, start, order.resolved, device, prepare)
    StageTraining(
        name=stage.name,
        task=task,
        chain=chain,
        training=training,
        evaluation=job.evaluation,
        listener=_RayListener(order.sink, order.run_store),
        device=device,
        data=_shards(),
        started=order.started,
    ).run(order.run_store.last_state(stage.name)[0])


def _shards() -> dict[str, Any]:
    """The worker's shards of Ray Data, where the driver gave the trainer any."""
    shards = {}
    for name in ("train", "eval"):
        try:
            shards[name] = ray.train.get_dataset_shard(name)
        except KeyError:
            continue
    return shards
