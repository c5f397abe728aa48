"""One stage as a Ray Train run: from the driver's order to the committed checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import ray
import ray.data
import ray.train
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchTrainer

from raycomp.distributed.cluster import Cluster
from raycomp.distributed.failures import StopOnOurErrors, translated
from raycomp.distributed.rendezvous import torch_config
from raycomp.distributed.worker import WorkerOrder, train_loop
from raycomp.errors import ClusterError
from raycomp.pipeline.task import Task
from raycomp.pipeline.user_code import user_code
from raycomp.results.progress import ProgressEvent

_POLL_S = 0.2


class Progress(Protocol):
    """Who shows a run's progress."""

    def message(self, line: str) -> None:
        """A part of the run begins or ends."""

    def event(self, event: ProgressEvent) -> None:
        """News from training."""


class Silent:
    """Shows nothing."""

    def message(self, line: str) -> None:
        """Nothing."""

    def event(self, event: ProgressEvent) -> None:
        """Nothing."""


class _Sink:
    """Holds progress events until the driver takes them."""

    def __init__(self) -> None:
        self._events: list[ProgressEvent] = []

    def push(self, event: ProgressEvent) -> None:
        self._events.append(event)

    def take(self) -> list[ProgressEvent]:
        events, self._events = self._events, []
        return events


@contextmanager
def progress_sink(progress: Progress) -> Iterator[ActorHandle]:
    """An actor that workers push events to; a thread of this process hands them on to `progress`."""
    sink = ray.remote(num_cpus=0)(_Sink).remote()
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_POLL_S):
            _hand_on(sink, progress)
        _hand_on(sink, progress)

    thread = threading.Thread(target=follow, name="raycomp-progress", daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(sink)


def _hand_on(sink: Any, progress: Progress) -> None:
    try:
        events = ray.get(sink.take.remote(), timeout=10)
    except ray.exceptions.RayError:
        return
    for event in events:
        progress.event(event)


def ray_datasets(task: Task) -> dict[str, ray.data.Dataset]:
    """Those of the task's data sets that are Ray Data's; Ray Train streams a shard of each to every worker."""
    with user_code(f"{type(task).__name__}.train_data() or eval_data()"):
        found = {"train": task.train_data(), "eval": task.eval_data()}
    return {name: data for name, data in found.items() if isinstance(data, ray.data.Dataset)}


def train_stage(
    order: WorkerOrder,
    cluster: Cluster,
    datasets: dict[str, ray.data.Dataset] | None = None,
    callbacks: list[Any] | None = None,
) -> str:
    """Trains one stage on the cluster; returns the path of its last committed checkpoint in the storage's filesystem.

    A stage that was begun under the same run goes on from where it was; one that is done returns at once.

    Args:
        order: the job, the stage, the places.
        cluster: where.
        datasets: what Ray Train shards, "train" and "eval".
        callbacks: Ray Train callbacks beside our own (a sweep's).

    Raises:
        TaskError, CompressionError, …: what a worker raised.
        ClusterError: workers were lost more often than `scaling.max_failures`.
    """
    job = order.job
    train = order.run_store.train
    resources = dict(job.scaling.resources_per_worker)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"order": order},
        scaling_config=RayScalingConfig(
            num_workers=job.scaling.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=job.stages[order.index].name,
            storage_path=train.path,
            storage_filesystem=train.filesystem,
            failure_config=FailureConfig(max_failures=job.scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[StopOnOurErrors(), *(callbacks or [])],
        ),
        datasets=dict(datasets or {}),
        torch_config=torch_config("nccl" if cluster.use_gpu else "gloo"),
    )
    with translated(train.uri):
        result = trainer.fit()
    if result.checkpoint is None:
        raise ClusterError("the training ended without a checkpoint", where=train.uri)
    return str(result.checkpoint.path)
