"""Global batches: the k-th of an epoch is the same set of samples on any number of workers.

A rank takes its slice of it; an uneven or a last small batch is right, no sample is repeated to pad. A rank without
samples takes part with a stand-in that weighs nothing, so that collectives meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from raycomp.core.batch_share import BatchShare, rank_slice
from raycomp.core.reduction import Statistic, reduce_
from raycomp.core.seeds import derived_seed
from raycomp.errors import TaskError
from raycomp.pipeline.data.samples import fetched_batches
from raycomp.pipeline.data.source import SampleSource
from raycomp.pipeline.data.streams import Slice, StreamView, slices
from raycomp.pipeline.user_code import user_code


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


def open_batches(task: SampleSource, data: Any, plan: BatchPlan) -> Batches:
    """Train data in whatever form the task gives it. A collective: every rank calls it.

    Raises:
        TaskError: the form is unknown, the data is empty, or the workers hold different numbers of samples.
    """
    if is_map_style(data):
        return GlobalBatches(task, data, plan)
    if isinstance(data, IterableDataset):
        return StreamBatches(task, data, plan)
    return LoaderBatches(task, as_loader_factory(task, data), plan)


def batches_of(task: SampleSource, data: Any, count: int) -> Iterator[Any]:
    """Batches of `count` samples, unshuffled, of data in whatever form; errors are the user's own."""
    if is_map_style(data):
        for first in range(0, len(data), count):
            yield task.collate([data[index] for index in range(first, min(first + count, len(data)))])
    elif isinstance(data, IterableDataset):
        yield from (each.batch for each in slices(task, data, StreamView(count)))
    else:
        yield from as_loader_factory(task, data)(LoaderContext(0, 1, count, 0, 0))


def first_batch(task: SampleSource, data: Any, count: int) -> Any:
    """The first batch of `count` samples; errors are the user's own.

    Raises:
        TaskError: there is none.
    """
    for batch in batches_of(task, data, count):
        return batch
    raise TaskError("the data is empty", where=type(task).__name__)


def is_map_style(data: Any) -> bool:
    """Whether samples can be asked for by index."""
    unfit = (IterableDataset, DataLoader, Mapping, TorchBatches)
    return not isinstance(data, unfit) and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def as_loader_factory(task: SampleSource, data: Any) -> LoaderFactory:
    """Data that comes in batches, as a function that gives a worker's batches of one epoch."""
    if isinstance(data, TorchBatches):
        return lambda context: data.iter_torch_batches(batch_size=context.batch_size)
    if callable(data):
        return data
    raise TaskError(
        f"data of type {type(data).__name__} can't be split among workers",
        where=type(task).__name__,
        remedy="return a map-style or iterable Dataset, a ray.data.Dataset, or a function of LoaderContext that gives "
        "an iterable of batches",
    )


class GlobalBatches:
    """Global batches of a map-style dataset.

    Args:
        task: gives collate, augment and the names in errors.
        dataset: with `__len__` and `__getitem__`; every rank sees the same samples in it.
        plan: how it is cut into steps.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, task: SampleSource, dataset: Any, plan: BatchPlan) -> None:
        self._task = task
        self._dataset = dataset
        self._plan = plan
        with user_code(f"{type(task).__name__}.train_data(): len()"):
            self._length = len(dataset)
        _check_length(self._length, type(task).__name__)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._length // self._plan.global_batch_size)

    def iterate(self, epoch: int) -> Iterator[list[MicroBatch]]:
        steps = [self._step(indices) for indices in self._global_batches(epoch)]
        wanted = [part.indices for parts in steps for part in parts]
        batches = fetched_batches(
            self._task, self._dataset, wanted, self._plan.seed, epoch, num_data_workers=self._plan.num_data_workers
        )
        for parts in steps:
            yield [MicroBatch(next(batches), part.share) for part in parts]

    def _global_batches(self, epoch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(derived_seed(self._plan.seed, epoch))
        return torch.split(torch.randperm(self._length, generator=generator), self._plan.global_batch_size)

    def _step(self, indices: Tensor) -> list[_Part]:
        pieces = (indices[rank_slice(len(indices), i, self._plan.accumulation)] for i in range(self._plan.accumulation))
        return [self._part(piece) for piece in pieces if len(piece)]

    def _part(self, indices: Tensor) -> _Part:
        mine = indices[rank_slice(len(indices), self._plan.rank, self._plan.world)]
        share = BatchShare(samples=len(mine), total=len(indices))
        # Two stand-ins, because a batch norm that is not synchronised refuses a single value per channel.
        return _Part(mine if len(mine) else indices[:1].expand(2), share)


class _Part(NamedTuple):
    indices: Tensor
    share: BatchShare


def _check_length(length: int, task_name: str) -> None:
    least, most = torch.tensor(length), torch.tensor(length)
    reduce_([Statistic(least, "min"), Statistic(most, "max")])
    if least != most:
        raise TaskError(
            f"the train data has {least} samples on one worker and {most} on another",
            where=f"{task_name}.train_data()",
            remedy="every worker must see the same samples; raycomp itself shares them out",
        )
    if length == 0:
        raise TaskError("the train data is empty", where=f"{task_name}.train_data()")


class LoaderBatches:
    """Batches of a loader that the task brings: which samples a worker sees is the loader's affair.

    Workers tell each other how many samples they hold, so that unequal batches weigh as they should; one whose loader
    ends before the others' goes on with its last batch as a stand-in.

    Args:
        task: counts the samples of a batch.
        factory: makes a worker's loader for one epoch.
        plan: how batches form steps.
    """

    notes: tuple[str, ...] = (
        "the train data is a loader of the task's own, taken as it is: whether every number of workers sees the same "
        + "global batches is up to it",
    )

    def __init__(self, task: SampleSource, factory: LoaderFactory, plan: BatchPlan) -> None:
        self._task = task
        self._factory = factory
        self._plan = plan
        self.steps_per_epoch = self._count_steps()

    def iterate(self, epoch: int) -> Iterator[list[MicroBatch]]:
        with user_code(self._where):
            loader = iter(self._loader(epoch))
        last = None
        while True:
            batches = self._take(loader)
            last = batches[-1][0] if batches else last
            counts = torch.zeros(self._plan.accumulation, dtype=torch.int64)
            counts[: len(batches)] = torch.tensor([count for _, count in batches])
            totals, starved = counts.clone(), torch.tensor(int(last is None))
            reduce_([Statistic(totals, "sum"), Statistic(starved, "max")])
            if not totals.any():
                return
            if starved:
                raise TaskError("a worker's loader gave no batch at all", where=self._where)
            yield list(self._shared([batch for batch, _ in batches], last, counts.tolist(), totals.tolist()))

    @property
    def _where(self) -> str:
        return f"{type(self._task).__name__}.train_data()"

    @property
    def _micro_batch_size(self) -> int:
        return -(-self._plan.global_batch_size // self._plan.accumulation)

    def _loader(self, epoch: int) -> Iterable[Any]:
        mine = rank_slice(self._micro_batch_size, self._plan.rank, self._plan.world)
        batch_size = max(1, mine.stop - mine.start)
        return self._factory(LoaderContext(self._plan.rank, self._plan.world, batch_size, epoch, self._plan.seed))

    def _take(self, loader: Iterator[Any]) -> list[tuple[Any, int]]:
        """The next step's batches, each with its samples."""
        with user_code(self._where):
            batches = list(islice(loader, self._plan.accumulation))
        with user_code(f"{type(self._task).__name__}.count_samples()"):
            return [(batch, self._task.count_samples(batch)) for batch in batches]

    def _shared(self, batches: list[Any], last: Any, counts: list[int], totals: list[int]) -> Iterator[MicroBatch]:
        for i, (count, total) in enumerate(zip(counts, totals, strict=True)):
            if total:
                batch = batches[i] if i < len(batches) else last
                yield MicroBatch(batch, BatchShare(count, total))

    def _count_steps(self) -> int | None:
        with user_code(self._where):
            loader = self._loader(0)
            length = _known_length(loader)
        least, most = torch.tensor(length), torch.tensor(length)
        reduce_([Statistic(least, "min"), Statistic(most, "max")])
        return -(-int(most) // self._plan.accumulation) if least >= 0 else None


class StreamBatches(LoaderBatches):
    """Global batches of an iterable dataset.

    Args:
        task: gives collate and the names in errors.
        data: gives every worker the same samples in the same order.
        plan: how it is cut into steps.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, task: SampleSource, data: IterableDataset[Any], plan: BatchPlan) -> None:
        self._data = data
        super().__init__(task, lambda context: (), plan)

    def _loader(self, epoch: int) -> Iterable[Any]:
        self._begins = True
        plan = self._plan
        view = StreamView(
            self._micro_batch_size, plan.rank, plan.world, plan.seed, epoch, num_data_workers=plan.num_data_workers
        )
        return slices(self._task, self._data, view)

    def _take(self, loader: Iterator[Any]) -> list[tuple[Any, int]]:
        with user_code(self._where):
            found: list[Slice] = list(islice(loader, self._plan.accumulation))
        if self._begins:
            self._check_agreement(found)
            self._begins = False
        return [(batch, samples) for batch, samples, _ in found]

    def _check_agreement(self, found: list[Slice]) -> None:
        digests = [torch.tensor(found[0].digest if found else 0) for _ in range(2)]
        reduce_([Statistic(digests[0], "min"), Statistic(digests[1], "max")])
        if digests[0] != digests[1]:
            raise TaskError(
                "the stream gives one worker other samples than another",
                where=self._where,
                remedy="raycomp itself shares it out: give every worker all of it, in one order; or return a function "
                "of LoaderContext that gives a worker its own batches",
            )

    def _count_steps(self) -> int | None:
        length = _known_length(self._data)
        return -(-length // (self._micro_batch_size * self._plan.accumulation)) if length >= 0 else None


def _known_length(loader: Iterable[Any]) -> int:
    """The number of batches, -1 where the loader can't tell (a DataLoader of a dataset without length raises)."""
    if not isinstance(loader, Sized):
        return -1
    try:
        return len(loader)
    except TypeError:
        return -1
