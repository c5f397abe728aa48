"""How train data is cut into steps, and what a step is made of: the same for data in any form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from raycomp.core.batch_share import BatchShare


@dataclass(frozen=True)
class LoaderContext:
    """What a task's own loader is told.

    Args:
        rank: of the worker that the loader is for.
        world: how many workers there are.
        batch_size: samples that this worker should give in each batch.
        epoch: counted from 0; evaluation is epoch 0.
        seed: the job's.
    """

    rank: int
    world: int
    batch_size: int
    epoch: int
    seed: int


LoaderFactory = Callable[[LoaderContext], Iterable[Any]]


@runtime_checkable
class TorchBatches(Protocol):
    """Data that comes in batches, already sharded: a `ray.data.Dataset`, or a worker's shard of one."""

    def iter_torch_batches(self, *, batch_size: int) -> Iterable[Any]: ...


class MicroBatch(NamedTuple):
    """A rank's part of one forward and backward pass.

    Args:
        batch: collated samples; a stand-in where `share.samples` is 0.
        share: this rank's samples among those of all ranks in this micro-batch.
    """

    batch: Any
    share: BatchShare


class Batches(Protocol):
    """Train data as a worker goes through it: each item is one optimizer step's micro-batches, never empty."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in an epoch; None where only reading the data would tell."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report should say about the data."""

    def iterate(self, epoch: int) -> Iterator[list[MicroBatch]]:
        """The steps of an epoch."""


@dataclass(frozen=True)
class BatchPlan:
    """How train data is cut into steps.

    Args:
        global_batch_size: samples of one optimizer step over all ranks.
        seed: of the order of samples and of augmentation.
        rank: this worker's.
        world: the number of workers.
        accumulation: micro-batches that a global batch is split into.
        num_data_workers: loading processes of this worker; 0 loads in its own process.
    """

    global_batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    accumulation: int = 1
    num_data_workers: int = 0
