"""Global batches: the k-th of an epoch is the same set of samples on any number of workers.

A rank takes its slice of it; an uneven or a last small batch is right, no sample is repeated to pad. A rank without
samples takes part with a stand-in that weighs nothing, so that collectives meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raycomp.core.batch_share import BatchShare, rank_slice
from raycomp.core.reduction import Statistic, reduce_
from raycomp.core.seeds import derived_seed
from raycomp.errors import TaskError
from raycomp.pipeline.data.plan import BatchPlan, MicroBatch
from raycomp.pipeline.data.samples import fetched_batches
from raycomp.pipeline.data.source import SampleSource
from raycomp.pipeline.user_code import user_code


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
