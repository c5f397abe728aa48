"""What goes with a channel when it is pruned: weights, multiply-accumulates, parameters. Values, found from the graph.

Channels are numbered over the whole model: coordinates of all dimensions that can only go together are one channel.
Those that the same layers make are a cell, of which only the number that stays matters for costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One dimension of a parameter, and which channel each of its coordinates goes with.

    Args:
        parameter: its full name.
        dim: the dimension; where there are groups, that within a group.
        channel_of: a channel for each coordinate, -1 for none. Where there are groups, of the first group's, then of
            the second's, …
        rank: how many dimensions the parameter has.
        groups: of a grouped convolution's weight, whose columns are other channels in each group.
    """

    parameter: str
    dim: int
    channel_of: tuple[int, ...]
    rank: int
    groups: int = 1

    def along(self, values: Tensor) -> Tensor:
        """What lies at each of its coordinates, summed: in the order of `channel_of`.

        Args:
            values: of the parameter's shape.
        """
        if self.groups == 1:
            return values.movedim(self.dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
        return values.unflatten(0, (self.groups, -1)).movedim(self.dim + 1, 1).flatten(2).sum(2).flatten()


@dataclass(frozen=True)
class Layers:
    """Layers whose output channels only go together, each time those of all of them.

    Args:
        modules: their names.
        channels: of each, in the order of their outputs.
    """

    modules: tuple[str, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Extent:
    """A dimension's size as a part of what it was: what is fixed, and a share for the channels of each cell."""

    fixed: float
    shares: tuple[tuple[int, float], ...]

    def of(self, kept: Sequence[float]) -> float:
        """The part that is left, where these parts of the cells are."""
        return self.fixed + sum(share * kept[cell] for cell, share in self.shares)


@dataclass(frozen=True)
class Term:
    """An amount in proportion to the sizes of dimensions."""

    amount: float
    extents: tuple[Extent, ...] = ()

    def of(self, kept: Sequence[float]) -> float:
        """What is left of it, where these parts of the cells are."""
        return self.amount * prod(extent.of(kept) for extent in self.extents)


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one sample, or parameters, as a function of the parts of the cells that stay."""

    terms: tuple[Term, ...]

    def of(self, kept: Sequence[float]) -> float:
        """Where these parts of the cells stay."""
        return sum(term.of(kept) for term in self.terms)


@dataclass(frozen=True)
class Coupling:
    """What a model's graph says about the channels of its layers.

    Args:
        cells: for each channel, its cell.
        parts: every dimension of a parameter in which channels lie.
        layers: all of the model's, those apart whose channels don't go together.
        macs: multiply-accumulates of one sample.
        parameters: parameters.
    """

    cells: tuple[int, ...]
    parts: tuple[Part, ...]
    layers: tuple[Layers, ...]
    macs: Cost
    parameters: Cost

    @property
    def costs(self) -> dict[str, Cost]:
        """By the names that budgets have."""
        return {"macs": self.macs, "parameters": self.parameters}

    def kept(self, stays: Tensor) -> list[float]:
        """The part of each cell that stays.

        Args:
            stays: bool, [channels].
        """
        sizes = torch.bincount(self._cell_of)
        left = torch.bincount(self._cell_of[stays], minlength=len(sizes))
        parts: list[float] = (left.double() / sizes).tolist()
        return parts

    def summed(self, along: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The sum over all coordinates that go with each channel: [channels].

        Args:
            along: of each part, what lies at its coordinates.
            dtype: in which it is added up.
        """
        if not along:
            return torch.zeros(len(self.cells), dtype=dtype)
        every = torch.cat([each.to(dtype) for each in along])
        # Behind the channels is a place for what goes with none.
        sums = every.new_zeros(len(self.cells) + 1).index_add_(0, self._places.to(every.device), every)
        return sums[:-1]

    def channels_of(self, parameter: str, dim: int) -> tuple[int, ...] | None:
        """The channels in a parameter's dimension; None where not all of its coordinates can go."""
        found = self._by_place.get((parameter, dim))
        return None if found is None or -1 in found.channel_of else found.channel_of

    def makers(self, channels: Sequence[int]) -> set[str]:
        """The layers that make any of these channels."""
        wanted = set(channels)
        return {name for each in self.layers if wanted.intersection(each.channels) for name in each.modules}

    def norms(self, channels: Sequence[int]) -> set[str]:
        """The modules whose weight has one entry for each channel, these among them."""
        wanted = set(channels)
        return {
            part.parameter.rpartition(".")[0]
            for part in self.parts
            if part.rank == 1 and part.parameter.endswith("weight") and wanted.intersection(part.channel_of)
        }

    @cached_property
    def _cell_of(self) -> Tensor:
        return torch.tensor(self.cells, dtype=torch.int64)

    @cached_property
    def _places(self) -> Tensor:
        """The channel of every part's every coordinate, one past the last for none."""
        places = torch.tensor([channel for part in self.parts for channel in part.channel_of], dtype=torch.int64)
        return places.where(places >= 0, len(self.cells))

    @cached_property
    def _by_place(self) -> dict[tuple[str, int], Part]:
        return {(part.parameter, part.dim): part for part in self.parts}
