"""The task's data, in whatever form it is, as batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from raycomp.errors import TaskError
from raycomp.pipeline.data.global_batches import GlobalBatches
from raycomp.pipeline.data.loaders import LoaderBatches, StreamBatches
from raycomp.pipeline.data.plan import Batches, BatchPlan, LoaderContext, LoaderFactory, TorchBatches
from raycomp.pipeline.data.source import SampleSource
from raycomp.pipeline.data.streams import StreamView, slices

_OF_THE_TASK = (
    "the train data is a loader of the task's own, taken as it is: whether every number of workers sees the same "
    "global batches is up to it"
)
_OF_RAY = (
    "the train data is Ray Data's: which rows a worker sees depends on their number, and those of an epoch that don't "
    "divide evenly among them are left out"
)


def open_batches(task: SampleSource, data: Any, plan: BatchPlan) -> Batches:
    """Train data in whatever form the task gives it. A collective: every rank calls it.

    Raises:
        TaskError: the form is unknown, the data is empty, or the workers hold different numbers of samples.
    """
    if is_map_style(data):
        return GlobalBatches(task, data, plan)
    if isinstance(data, IterableDataset):
        return StreamBatches(task, data, plan)
    note = _OF_RAY if isinstance(data, TorchBatches) else _OF_THE_TASK
    return LoaderBatches(task, as_loader_factory(task, data), plan, (note,))


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
