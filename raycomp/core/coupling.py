"""What goes with a channel when it is pruned: weights, multiply-accumulates, parameters. Values, found from the graph.

Channels are numbered over the whole model: coordinates of all dimensions that can only go together are one channel.
Those that the same layers make are a cell, of which only the number that stays matters for costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod

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

    def add_to_(self, sums: Tensor, values: Tensor) -> None:
        """Adds what lies at its coordinates to the sums of their channels.

        Args:
            sums: [channels].
            values: of the parameter's shape.
        """
        if self.groups == 1:
            along = values.movedim(self.dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
        else:
            along = values.unflatten(0, (self.groups, -1)).movedim(self.dim + 1, 1).flatten(2).sum(2).flatten()
        places, channels = (index.to(values.device) for index in self._taken)
        sums.index_add_(0, channels, along[places].to(sums.dtype))

    @cached_property
    def _taken(self) -> tuple[Tensor, Tensor]:
        """The coordinates that go with a channel, and their channels."""
        channels = torch.tensor(self.channel_of)
        places = (channels >= 0).nonzero().flatten()
        return places, channels[places]


@dataclass(frozen=True)
class Layers:
    """Layers whose output channels only go together, each time those of all of them.

    Args:
        modules: their names.
        channels: of each, in the order of their outputs.
        obstacle: why none of them can ever go; None where they can.
        blocks: in each of this many equal parts of them the same number must go (grouped convolutions).
    """

    modules: tuple[str, ...]
    channels: tuple[int, ...]
    obstacle: str | None = None
    blocks: int = 1


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

    def channels_of(self, parameter: str, dim: int) -> tuple[int, ...] | None:
        """The channels in a parameter's dimension; None where not all of its coordinates can go."""
        found = self._by_place.get((parameter, dim))
        return None if found is None or -1 in found.channel_of else found.channel_of

    def makers(self, channels: Sequence[int]) -> set[str]:
        """The layers that make any of these channels."""
        wanted = set(channels)
        return {name for each in self.layers if wanted.intersection(each.channels) for name in each.modules}

    def blocks(self, channels: Sequence[int]) -> int:
        """In how many equal parts of these channels the same number must go."""
        wanted = set(channels)
        return lcm(*(each.blocks for each in self.layers if wanted.intersection(each.channels)))

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
    def _by_place(self) -> dict[tuple[str, int], Part]:
        return {(part.parameter, part.dim): part for part in self.parts}
