"""Budgets: which part of each target goes, so that the model keeps within multiply-accumulates or parameters.

What goes with a channel is known from the graph (`Coupling`), so that nothing is cut to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from raycomp.core.coupling import Coupling

_ROUNDING = 1e-9


class Prunable(Protocol):
    """Targets that share one mask, which grows step by step; a `masks.Unit`."""

    @property
    def keys(self) -> list[Hashable]:
        """Its targets."""

    @property
    def values(self) -> Tensor:
        """The saliency of each step."""

    def clamps(self) -> tuple[int, int]:
        """The least and the greatest number of steps."""

    def mask(self, count: int) -> Tensor:
        """True = keep, of its blocks, after that many steps."""


@dataclass(frozen=True)
class Costs:
    """What the masks of targets cost.

    Args:
        coupling: what goes with each channel.
        channels: of each target whose channels can go, in the order of its output channels.
    """

    coupling: Coupling
    channels: Mapping[Hashable, tuple[int, ...]]

    def of(self, masks: Mapping[Hashable, Tensor]) -> dict[str, float]:
        """The parts of the model's costs that are left behind speedup, by name.

        Args:
            masks: of blocks of channels; a channel stays where one target keeps it, or none has it.
        """
        masked = torch.zeros(len(self.coupling.cells), dtype=torch.bool)
        stays = torch.zeros_like(masked)
        for key, mask in masks.items():
            channels = self._indices[key]
            masked[channels] = True
            stays[channels[mask.repeat_interleave(len(channels) // mask.numel()).cpu()]] = True
        kept = self.coupling.kept(stays | ~masked)
        return {name: cost.of(kept) / self._whole[name] for name, cost in self.coupling.costs.items()}

    @cached_property
    def _whole(self) -> dict[str, float]:
        """What the model has."""
        whole = self.coupling.kept(torch.ones(len(self.coupling.cells), dtype=torch.bool))
        return {name: cost.of(whole) for name, cost in self.coupling.costs.items()}

    @cached_property
    def _indices(self) -> dict[Hashable, Tensor]:
        return {key: torch.tensor(channels) for key, channels in self.channels.items()}

    def part(self, name: str, limit: float) -> float:
        """A limit as a part of what the model has."""
        return limit if limit <= 1 else limit / self._whole[name]

    def within(self, limits: Mapping[str, float], masks: Mapping[Hashable, Tensor]) -> bool:
        """Whether what is left is within limits, which are parts of what the model has."""
        found = self.of(masks)
        return all(found[name] <= limit + _ROUNDING for name, limit in limits.items())

    def due(self, limits: Mapping[str, float], fraction: float) -> dict[str, float]:
        """The limits, as parts of what the model has, after a fraction of the way to them."""
        return {name: 1 - fraction * (1 - self.part(name, limit)) for name, limit in limits.items()}


def counts_within(
    units: Sequence[Prunable], keys: Sequence[Tensor], fits: Callable[[Sequence[int]], bool]
) -> tuple[list[int], bool]:
    """How many steps each unit takes, no more than need be: all units' steps go in one order until the goal is met;
    then the last ones of units come back that it doesn't need, where the step that met it was a large one.

    Args:
        units: all that the goal is for.
        keys: for each unit, what its steps are ordered by, ascending; ties go by the order of the units.
        fits: whether these counts meet the goal; more steps never meet it less.

    Returns:
        a count for each unit, and whether the goal is met: it isn't where all that may go doesn't do.
    """
    sizes = [len(each) for each in keys]
    owner = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes)])
    rank = torch.cat([torch.arange(size) for size in sizes])
    least, most = (torch.tensor(side) for side in zip(*(unit.clamps() for unit in units), strict=True))
    order = torch.cat([each.double().cpu() for each in keys]).argsort(stable=True)
    order = order[((rank >= least[owner]) & (rank < most[owner]))[order]]

    def counts(taken: int) -> list[int]:
        found: list[int] = (least + torch.bincount(owner[order[:taken]], minlength=len(units))).tolist()
        return found

    low, high = 0, len(order)
    if not fits(counts(high)):
        return counts(high), False
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(counts(middle)) else (middle + 1, high)
    return _without_surplus(counts(low), keys, least.tolist(), fits), True


def _without_surplus(
    counts: list[int], keys: Sequence[Tensor], least: Sequence[int], fits: Callable[[Sequence[int]], bool]
) -> list[int]:
    """The counts without steps that the goal doesn't need: of the steps that units took last, those that come late in
    the order are given back first. What can't be given back once can't be later, either."""

    def lateness(index: int) -> tuple[float, int]:
        return float(keys[index][counts[index] - 1]), index

    open_ = [index for index, count in enumerate(counts) if count > least[index]]
    while open_:
        index = max(open_, key=lateness)
        fewer = [count - (place == index) for place, count in enumerate(counts)]
        if fits(fewer):
            counts = fewer
        if counts is not fewer or counts[index] == least[index]:
            open_.remove(index)
    return counts


def even_keys(units: Sequence[Prunable]) -> list[Tensor]:
    """The part of a unit that is gone with each of its steps: in their order all units lose the same part."""
    return [(torch.arange(len(unit.values)) + 1) / len(unit.values) for unit in units]


def ranked_keys(units: Sequence[Prunable]) -> list[Tensor]:
    """The saliency of each step, ascending."""
    return [unit.values.sort(stable=True).values for unit in units]


def masks_of(units: Sequence[Prunable], counts: Sequence[int]) -> dict[Hashable, Tensor]:
    """The masks of all units' targets, of blocks, after so many steps."""
    return {
        key: mask for unit, count in zip(units, counts, strict=True) for mask in [unit.mask(count)] for key in unit.keys
    }
