"""Budgets: which part of each target goes, so that the model keeps within multiply-accumulates or parameters.

What goes with a channel is known from the graph (`Coupling`), so that nothing is cut to find out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raycomp.core.coupling import Coupling


class Prunable(Protocol):
    """Targets that share one mask, which grows step by step; a `masks._Unit`."""

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
            channels = torch.tensor(self.channels[key])
            masked[channels] = True
            stays[channels[mask.repeat_interleave(len(channels) // mask.numel()).cpu()]] = True
        kept, whole = self.coupling.kept(stays | ~masked), self.coupling.kept(torch.ones_like(masked))
        return {name: cost.of(kept) / cost.of(whole) for name, cost in self.coupling.costs.items()}

    def part(self, name: str, limit: float) -> float:
        """A limit as a part of what the model has."""
        whole = self.coupling.kept(torch.ones(len(self.coupling.cells), dtype=torch.bool))
        return limit if limit <= 1 else limit / self.coupling.costs[name].of(whole)


def budget_counts(
    units: Sequence[Prunable], costs: Costs, limits: Mapping[str, float], fraction: float, *, ranked: bool
) -> tuple[list[int], tuple[str, ...]]:
    """How many steps each unit takes, so that what stays is within the limits, and no fewer than need be.

    Args:
        units: all that the budget is for.
        costs: what masks cost.
        limits: of "macs" or "parameters": a part of what there is (up to 1), or a number.
        fraction: how much of the way to the limits is due.
        ranked: whether steps go in the order of their saliency over all units; else all lose the same part.

    Returns:
        a count for each unit, and what the user should know.
    """
    due = {name: 1 - fraction * (1 - costs.part(name, limit)) for name, limit in limits.items()}
    owner, rank, key = _steps(units, ranked=ranked)
    least, most = (torch.tensor(side) for side in zip(*(unit.clamps() for unit in units), strict=True))
    free = (rank >= least[owner]) & (rank < most[owner])
    order = key.argsort(stable=True)
    order = order[free[order]]

    def counts(taken: int) -> list[int]:
        return (least + torch.bincount(owner[order[:taken]], minlength=len(units))).tolist()

    def fits(taken: int) -> bool:
        masks = {
            key: mask
            for unit, count in zip(units, counts(taken), strict=True)
            for mask in [unit.mask(count)]
            for key in unit.keys
        }
        found = costs.of(masks)
        return all(found[name] <= limit + 1e-9 for name, limit in due.items())

    low, high = 0, len(order)
    if not fits(high):
        return counts(high), (f"the budget {dict(limits)} can't be met: all that may go is masked",)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return counts(low), ()


def _steps(units: Sequence[Prunable], *, ranked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of every step: its unit, its place among the unit's, and what it is ordered by."""
    sizes = [len(unit.values) for unit in units]
    owner = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes)])
    rank = torch.cat([torch.arange(size) for size in sizes])
    if ranked:
        return owner, rank, torch.cat([unit.values.sort(stable=True).values.double().cpu() for unit in units])
    return owner, rank, torch.cat([(torch.arange(size) + 1) / size for size in sizes])
