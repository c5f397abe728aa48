"""Where an operator that moves elements takes them from, dimension by dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Ids


@dataclass(frozen=True)
class Link:
    """How one dimension of an input and one of an output go together.

    Args:
        source_dim, target_dim: the dimensions.
        source, target: pairs of coordinates that go together.
        merges: whether several output coordinates may come from one input coordinate.
        splits: whether several input coordinates may go to one output coordinate.
    """

    source_dim: int
    target_dim: int
    source: Ids
    target: Ids
    merges: bool
    splits: bool


class Origin:
    """Where the elements of one output come from in one input.

    Args:
        index_map: for each element of the output its flat index in the input, -1 where it comes from elsewhere.
        shape: the input's shape.
    """

    def __init__(self, index_map: Tensor, shape: tuple[int, ...]) -> None:
        self._present = (index_map >= 0).reshape(-1)
        flat = index_map.reshape(-1)[self._present]
        self._sources = _unravel(flat, shape)
        everywhere = torch.nonzero(self._present).reshape(-1)
        self._targets = _unravel(everywhere, tuple(index_map.shape))
        self.source_shape, self.target_shape = shape, tuple(index_map.shape)

    def link(self, source_dim: int, target_dim: int) -> Link | None:
        """How two dimensions go together; None where they don't."""
        source, target = self._sources[source_dim], self._targets[target_dim]
        size = self.target_shape[target_dim]
        pairs = _distinct(source * size + target, self.source_shape[source_dim] * size)
        sources, targets = pairs // size, pairs % size
        merges = len(torch.unique(targets)) == len(targets)
        splits = len(torch.unique(sources)) == len(sources)
        if not (merges or splits):
            return None
        several_targets = len(torch.unique(sources)) < len(sources)
        several_sources = len(torch.unique(targets)) < len(targets)
        return Link(source_dim, target_dim, sources.numpy(), targets.numpy(), several_targets, several_sources)

    def used(self, source_dim: int) -> Ids:
        """The input coordinates with an element that the output holds."""
        used: Ids = _distinct(self._sources[source_dim], self.source_shape[source_dim]).numpy()
        return used


def _distinct(numbers: Tensor, bound: int) -> Tensor:
    """The distinct numbers in ascending order, without sorting them where a table of all of them is small enough."""
    if bound > max(1_000_000, 4 * len(numbers)):
        distinct: Tensor = torch.unique(numbers)
        return distinct
    table = torch.zeros(bound, dtype=torch.bool)
    table[numbers] = True
    found: Tensor = torch.nonzero(table).reshape(-1)
    return found


def _unravel(flat: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    coordinates = []
    for size in reversed(shape):
        coordinates.append(flat % size)
        flat = flat // size
    return coordinates[::-1]
