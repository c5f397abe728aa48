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
from raycomp.distributed.progress import Progress
from raycomp.distributed.ray_data import Shards
from raycomp.distributed.rendezvous import torch_config
from raycomp.distributed.run_store import KEPT_CHECKPOINTS
from raycomp.distributed.worker import News, Saved, WorkerOrder, train_loop
from raycomp.errors import NotFiniteError
from raycomp.results.progress import ProgressEvent
from raycomp.storage import Store

_POLL_S = 0.2
_CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"


class Listener(Progress, Protocol):
    """Who follows a run's training on the driver."""

    def saved(self, checkpoint: Saved) -> None:
        """A checkpoint is in storage."""


class _Sink:
    """Holds news until the driver takes it."""

    def __init__(self) -> None:
        self._news: list[News] = []

    def push(self, news: News) -> None:
        self._news.append(news)

    def take(self) -> list[News]:
        news, self._news = self._news, []
        return news


@contextmanager
def progress_sink(listener: Listener) -> Iterator[ActorHandle]:
    """An actor that workers and Ray's controllers push news to; a thread of this process hands it on to `listener`."""
    sink = ray.remote(num_cpus=0)(_Sink).remote()
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_POLL_S):
            _hand_on(sink, listener)
        _hand_on(sink, listener)

    thread = threading.Thread(target=follow, name="raycomp-progress", daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        ended.set()
        thread.join(timeout=10)
        ray.kill(sink)


def _hand_on(sink: Any, listener: Listener) -> None:
    try:
        found = ray.get(sink.take.remote(), timeout=10)
    except ray.exceptions.RayError:
        return
    for news in found:
        match news:
            case str():
                listener.message(news)
            case Saved():
                listener.saved(news)
            case ProgressEvent():
                listener.event(news)


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """None: an interrupt of the driver is the job's affair."""


def _forget_list(stage: Store) -> None:
    """Ray would not begin with a list of checkpoints that is damaged, or another Ray's; none is needed."""
    if stage.exists(_CHECKPOINT_LIST):
        stage.delete(_CHECKPOINT_LIST)


def train_stage(
    order: WorkerOrder,
    cluster: Cluster,
    datasets: dict[str, ray.data.Dataset] | None = None,
    callbacks: list[Any] | None = None,
) -> None:
    """Trains one stage on the cluster; `RunStore.last_state` then gives what came of it.

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
    trainer = _Trainer(
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
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            callbacks=[StopOnOurErrors(order.sink), *(callbacks or [])],
        ),
        datasets=dict(datasets or {}),
        dataset_config=Shards(),
        torch_config=torch_config("nccl" if cluster.use_gpu else "gloo"),
    )
    _forget_list(train.join(order.job.stages[order.index].name))
    try:
        with translated(train.uri):
            trainer.fit()
    except NotFiniteError as error:
        # Its remedy speaks of a checkpoint: here they are.
        error.where = train.join(order.job.stages[order.index].name).uri
        raise
