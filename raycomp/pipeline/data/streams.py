"""Streams: an iterable dataset that is the same on every worker, shared out batch by batch.

Each worker reads all of it and keeps its slice of every global batch, so that batches are the same on any number of
workers, and no sample is seen twice or lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from raycomp.core.batch_share import rank_slice
from raycomp.core.reduction import Statistic, reduce_
from raycomp.core.seeds import OwnGenerators, derived_seed
from raycomp.errors import TaskError
from raycomp.pipeline.data.source import SampleSource

_TOLD = 64


class Slice(NamedTuple):
    """A worker's part of a global batch.

    Args:
        batch: collated samples; a stand-in where `samples` is 0.
        samples: how many of them are this worker's.
        digest: of the global batch: the same on every worker.
    """

    batch: Any
    samples: int
    digest: int


@dataclass(frozen=True)
class StreamView:
    """How a worker goes through a stream.

    Args:
        total: samples of a global batch.
        rank, world: which part of each is this worker's.
        seed, epoch: of what the stream draws from the global generators.
        most: samples that are read, None for all.
        num_data_workers: whether a process of its own reads; more than one would each read everything.
    """

    total: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    epoch: int = 0
    most: int | None = None
    num_data_workers: int = 0


def slices(task: SampleSource, data: IterableDataset[Any], view: StreamView) -> Iterable[Slice]:
    """This worker's part of every global batch of one epoch."""
    if hasattr(data, "set_epoch"):
        data.set_epoch(view.epoch)
    return DataLoader(
        _Slices(task, data, view), batch_size=None, collate_fn=_as_it_is, num_workers=min(view.num_data_workers, 1)
    )


class _Slices(IterableDataset[Slice]):
    def __init__(self, task: SampleSource, data: IterableDataset[Any], view: StreamView) -> None:
        self._task, self._data, self._view = task, data, view

    def __iter__(self) -> Iterator[Slice]:
        view = self._view
        # Between two batches the model trains, and draws other numbers on every worker.
        generators = OwnGenerators(derived_seed(view.seed, view.epoch))
        with generators.used():
            samples = islice(iter(self._data), view.most)
        while True:
            with generators.used():
                chunk = list(islice(samples, view.total))
                if not chunk:
                    return
                mine = chunk[rank_slice(len(chunk), view.rank, view.world)]
                # Two stand-ins, because a batch norm refuses a single value per channel.
                batch = self._task.collate(mine or chunk[:1] * 2)
            yield Slice(batch, len(mine), _digest(chunk))


def _as_it_is(item: Any) -> Any:
    return item


def check_same_stream(digest: int, where: str) -> None:
    """Refuses a stream that gives one worker other samples than another. A collective, once for each global batch.

    Args:
        digest: of the global batch; 0 where the stream has ended here.
        where: what gave the stream.

    Raises:
        TaskError: on every worker.
    """
    least, most = torch.tensor(digest), torch.tensor(digest)
    reduce_([Statistic(least, "min"), Statistic(most, "max")])
    if least != most:
        raise TaskError(
            "the stream gives one worker other samples than another",
            where=where,
            remedy="raycomp itself shares it out: give every worker all of it, in one order; or return a function of "
            "LoaderContext that gives a worker its own batches",
        )


def _digest(chunk: list[Any]) -> int:
    """A fingerprint of a global batch: the beginning of each value, which costs little and tells samples apart."""
    state = hashlib.blake2b(digest_size=7)
    for leaf in pytree.tree_leaves(chunk):
        state.update(_beginning(leaf))
    return int.from_bytes(state.digest()) or 1


def _beginning(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        dense = leaf.detach() if leaf.layout == torch.strided else leaf.detach().coalesce().values()
        flat = dense.flatten()[:_TOLD].cpu()
        return repr((tuple(leaf.shape), leaf.dtype, flat.tolist())).encode()
    if isinstance(leaf, str | bytes | int | float | bool | None):
        return repr(leaf)[:_TOLD].encode()
    whole = getattr(leaf, "tobytes", None)
    return whole()[:_TOLD] if callable(whole) else type(leaf).__name__.encode()
