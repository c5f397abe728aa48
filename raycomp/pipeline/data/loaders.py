"""Batches that come ready made: of a loader that the task brings, or cut from a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from raycomp.core.batch_share import BatchShare, rank_slice
from raycomp.core.reduction import Statistic, reduce_
from raycomp.errors import TaskError
from raycomp.pipeline.data.plan import BatchPlan, LoaderContext, LoaderFactory, MicroBatch
from raycomp.pipeline.data.source import SampleSource
from raycomp.pipeline.data.streams import Slice, StreamView, check_same_stream, slices
from raycomp.pipeline.user_code import user_code


class LoaderBatches:
    """Batches of a loader that the task brings: which samples a worker sees is the loader's affair.

    Workers tell each other how many samples they hold, so that unequal batches weigh as they should; one whose loader
    ends before the others' goes on with its last batch as a stand-in.

    Args:
        task: counts the samples of a batch.
        factory: makes a worker's loader for one epoch.
        plan: how batches form steps.
        notes: what the report should say of the data.
    """

    def __init__(
        self, task: SampleSource, factory: LoaderFactory, plan: BatchPlan, notes: tuple[str, ...] = ()
    ) -> None:
        self.notes = notes
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

    def __init__(self, task: SampleSource, data: IterableDataset[Any], plan: BatchPlan) -> None:
        self._data = data
        super().__init__(task, lambda context: (), plan)

    def _loader(self, epoch: int) -> Iterable[Any]:
        plan = self._plan
        view = StreamView(
            self._micro_batch_size, plan.rank, plan.world, plan.seed, epoch, num_data_workers=plan.num_data_workers
        )
        return slices(self._task, self._data, view)

    def _take(self, loader: Iterator[Any]) -> list[tuple[Any, int]]:
        with user_code(self._where):
            found: list[Slice] = list(islice(loader, self._plan.accumulation))
        check_same_stream(found[0].digest if found else 0, self._where)
        return [(batch, samples) for batch, samples, _ in found]

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
