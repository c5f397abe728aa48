"""Metrics of a model over all evaluation samples of all workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from raycomp.core.batch_share import rank_slice
from raycomp.core.model import evaluation_mode
from raycomp.core.reduction import Statistic, gathered, reduce_
from raycomp.core.seeds import restored_generators, seed_everything
from raycomp.errors import TaskError
from raycomp.pipeline.data.batches import as_loader_factory, is_map_style
from raycomp.pipeline.data.plan import LoaderContext
from raycomp.pipeline.data.samples import fetched_batches
from raycomp.pipeline.data.streams import StreamView, check_same_stream, slices
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.task import Task
from raycomp.pipeline.user_code import user_code


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    data: Any,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_samples: int | None = None,
    rank: int = 0,
    world: int = 1,
    num_data_workers: int = 0,
) -> dict[str, float]:
    """The mean of each of the task's metrics over the samples, in the task's order; the same on every rank.

    A map-style dataset is shared out among the workers, every sample once. The model is evaluated in eval mode; each of
    its modules is afterwards in the mode that it was in. A collective: every rank calls it.

    Args:
        task: gives forward and metrics.
        model: plain or wrapped in DDP; already on `device`.
        data: what `task.eval_data()` gave.
        batch_size: samples in one forward pass of one worker.
        device: where the batches go.
        dtype: of floating inputs; None leaves them as they are.
        max_samples: of all workers together; None for all there are.
        rank: this worker's.
        world: the number of workers; 1 evaluates all of the data here, whatever process group there is.
        num_data_workers: loading processes of this worker.

    Raises:
        TaskError: there is nothing to evaluate, or the metrics are not one value per sample.
    """
    # DDP's first forward after a training step broadcasts buffers, for which a rank that evaluates alone would wait.
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    tally = Tally(task, plain, device, dtype)
    view = View(batch_size, max_samples, rank, world, num_data_workers)
    with evaluation_mode(plain), restored_generators():
        for batch, wanted in evaluation_batches(task, data, view):
            tally.add(batch, wanted)
    return tally.means(world)


class Tally:
    """The metrics of one model, summed over the batches that it is given.

    Args:
        task: gives forward and metrics.
        model: in eval mode.
        device: where the batches go.
        dtype: of floating inputs; None leaves them as they are.
    """

    def __init__(
        self, task: Task, model: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self._task, self._model, self._device, self._dtype = task, model, device, dtype
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self, batch: Any, wanted: int) -> None:
        """Runs the model on a batch, of which the first `wanted` samples count.

        A forward that draws in evaluation mode, too, draws the same for every model that is given the batch.
        """
        moved = move_batch(batch, self._device, self._dtype)
        seed_everything(self._count)
        with user_code(f"{type(self._task).__name__}.forward()"):
            output = self._task.forward(self._model, moved)
        with user_code(f"{type(self._task).__name__}.metrics()"):
            values = self._task.metrics(output, moved)
        _check_metrics(values)
        with user_code(f"{type(self._task).__name__}.count_samples()"):
            present = self._task.count_samples(moved)
        _add(self._sums, values, present, wanted)
        self._count += min(wanted, present)

    def means(self, world: int = 1) -> dict[str, float]:
        """The mean of each metric over all samples of all workers; a collective, if there are several.

        Raises:
            TaskError: there was nothing to evaluate.
        """
        return _means(self._sums, self._count, world, type(self._task).__name__)


@dataclass(frozen=True)
class View:
    """Which part of the evaluation data a worker goes through, and how; the arguments are those of `evaluate`."""

    batch_size: int
    max_samples: int | None = None
    rank: int = 0
    world: int = 1
    num_data_workers: int = 0


def evaluation_batches(task: Task, data: Any, view: View) -> Iterator[tuple[Any, int]]:
    """This worker's batches, each with how many of its samples count; a worker without samples gets one with none."""
    if is_map_style(data):
        yield from _indexed_batches(task, data, view)
        return
    if isinstance(data, IterableDataset):
        yield from _streamed_batches(task, data, view)
        return
    left = view.max_samples
    if left is not None:
        part = rank_slice(left, view.rank, view.world)
        left = part.stop - part.start
    for batch in _loaded(task, data, view):
        with user_code(f"{type(task).__name__}.count_samples()"):
            present = task.count_samples(batch)
        yield batch, present if left is None else min(present, left)
        if left is not None:
            left -= min(present, left)
            if left == 0:
                return


def _indexed_batches(task: Task, data: Any, view: View) -> Iterator[tuple[Any, int]]:
    with user_code(f"{type(task).__name__}.eval_data(): len()"):
        total = len(data) if view.max_samples is None else min(len(data), view.max_samples)
    if total == 0:
        return
    mine = torch.arange(total)[rank_slice(total, view.rank, view.world)]
    wanted = list(torch.split(mine, view.batch_size)) if len(mine) else [torch.tensor([0])]
    counts = [len(indices) for indices in wanted] if len(mine) else [0]
    fetched = fetched_batches(task, data, wanted, 0, 0, augment=False, num_data_workers=view.num_data_workers)
    yield from zip(fetched, counts, strict=True)


def _streamed_batches(task: Task, data: IterableDataset[Any], view: View) -> Iterator[tuple[Any, int]]:
    total = view.batch_size * view.world
    stream = StreamView(total, view.rank, view.world, most=view.max_samples, num_data_workers=view.num_data_workers)
    where = f"{type(task).__name__}.eval_data()"
    with user_code(where):
        found = iter(slices(task, data, stream))
    while True:
        with user_code(where):
            each = next(found, None)
        if view.world > 1:
            check_same_stream(0 if each is None else each.digest, where)
        if each is None:
            return
        yield each.batch, each.samples


def _loaded(task: Task, data: Any, view: View) -> Iterator[Any]:
    factory = as_loader_factory(task, data)
    with user_code(f"{type(task).__name__}.eval_data()"):
        loader: Iterable[Any] = factory(LoaderContext(view.rank, view.world, view.batch_size, 0, 0))
        yield from loader


def _check_metrics(values: Any) -> None:
    if not isinstance(values, Mapping) or not values or not all(isinstance(name, str) for name in values):
        found = f"a mapping of {list(values)}" if isinstance(values, Mapping) else type(values).__name__
        remedy = "give a dict: each metric's name, and its value for every sample, [n]"
        raise TaskError(f"it gave {found}", where="Task.metrics", remedy=remedy)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], present: int, wanted: int) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.shape != (present,):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TaskError(
                f"metric {name!r} is {found} for a batch of {present} samples",
                where="Task.metrics",
                remedy="give one value per sample: raycomp itself takes the mean over all samples of all workers",
            )
        total = value[:wanted].detach().double().sum().cpu()
        sums[name] = sums[name] + total if name in sums else total


def _means(sums: dict[str, Tensor], count: int, world: int, task_name: str) -> dict[str, float]:
    counted, fewest = torch.tensor(count, dtype=torch.float64), torch.tensor(len(sums))
    if world > 1:
        reduce_([Statistic(fewest, "min"), Statistic(counted, "sum")])
    if world > 1 and fewest == 0 and counted > 0:
        nothing = torch.zeros((), dtype=torch.float64)
        # A worker that got no sample never saw what the metrics are called.
        names: tuple[str, ...] = next(filter(None, gathered(tuple(sums))), ())
        sums = {name: sums.get(name, nothing.clone()) for name in names}
    if counted == 0 or not sums:
        raise TaskError(
            "there is nothing to evaluate", where=f"{task_name}.eval_data()", remedy="give a sample and a metric"
        )
    if world > 1:
        reduce_([Statistic(total, "sum") for total in sums.values()])
    return {name: float(total / counted) for name, total in sums.items()}
