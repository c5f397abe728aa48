"""From saliencies to masks: threshold → dependency → global → ratio. Pure functions, no model and no lifecycle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import floor, lcm

import torch
from torch import Tensor

from raycomp.config import PruneTarget

_ROUNDING = 1e-9
"""Keeps 0.29 × 100 from being 28."""


@dataclass(frozen=True, eq=False)
class MaskRequest:
    """One target's saliency and goal.

    Args:
        key: names the target.
        saliency: one value per block, higher = keep.
        elements: elements in one block.
        settings: sparse_ratio or sparse_threshold, the clamps and the group ids.
        fraction: how much of the goal is due now (a schedule's 0 to 1).
        pruned: blocks that are pruned already and stay so; None for none.
    """

    key: Hashable
    saliency: Tensor
    elements: int
    settings: PruneTarget
    fraction: float = 1.0
    pruned: Tensor | None = None


def make_masks(requests: Sequence[MaskRequest]) -> dict[Hashable, Tensor]:
    """A boolean mask per request, True = keep, in the shape of its saliency.

    Targets of one dependency group share a mask (made from their mean saliency); targets of one global group are ranked
    together, ties going by the order of the requests and then by index. The clamps hold for each target in every mode.

    Raises:
        ValueError: members of a group whose shapes, ratios or block counts don't fit each other.
    """
    units = _units(requests)
    counts = {id(unit): unit.wanted() for unit in units if unit.settings.global_group_id is None}
    groups: dict[str, list[_Unit]] = defaultdict(list)
    for unit in units:
        if unit.settings.global_group_id is not None:
            groups[unit.settings.global_group_id].append(unit)
    for name, members in groups.items():
        counts |= _global_counts(name, members)
    made: dict[Hashable, Tensor] = {}
    for unit in units:
        mask = unit.mask(counts[id(unit)])
        made |= {member.key: mask.view(member.saliency.shape) for member in unit.members}
    return made


class _Unit:
    """Targets that share one mask; with internal blocks, the j-th least of every block go together as one step."""

    def __init__(self, members: Sequence[MaskRequest]) -> None:
        self.members = members
        self.settings = members[0].settings
        self.fraction = members[0].fraction
        self._check()
        blocks = lcm(*(member.settings.internal_metric_block or 1 for member in members))
        saliency = torch.stack([_pinned(member).flatten() for member in members]).mean(dim=0)
        if saliency.numel() % blocks:
            raise ValueError(
                f"internal_metric_block {blocks} doesn't divide the {saliency.numel()} blocks of {members[0].key}"
            )
        values, self.order = saliency.view(blocks, -1).sort(dim=1, stable=True)
        self.values = values.mean(dim=0)
        self.step_elements = blocks * sum(member.elements for member in members)

    def _check(self) -> None:
        first = self.members[0]
        for member in self.members[1:]:
            if _grid(member) != _grid(first):
                shapes = tuple(first.saliency.shape), tuple(member.saliency.shape)
                raise ValueError(f"{first.key} and {member.key} share a dependency group, but have {shapes} blocks")
            for name in ("sparse_ratio", "sparse_threshold", "global_group_id"):
                if getattr(member.settings, name) != getattr(first.settings, name):
                    raise ValueError(f"{first.key} and {member.key} share a dependency group, but differ in {name}")

    def clamps(self) -> tuple[int, int]:
        """The least and the greatest number of steps that may be pruned; what is pruned already stays so."""
        least = max(member.settings.min_sparse_ratio or 0.0 for member in self.members)
        given = [member.settings.max_sparse_ratio for member in self.members]
        most = min([ratio for ratio in given if ratio is not None], default=1.0)
        pinned = int((self.values == -torch.inf).sum())
        return max(_share(len(self.values), least * self.fraction), pinned), max(_share(len(self.values), most), pinned)

    def wanted(self) -> int:
        """The number of steps to prune by threshold or ratio, clamped."""
        threshold, ratio = self.settings.sparse_threshold, self.settings.sparse_ratio
        if threshold is not None:
            count = int((self.values < threshold * self.fraction).sum())
        else:
            count = _share(len(self.values), (ratio or 0.0) * self.fraction)
        least, most = self.clamps()
        return min(max(count, least), most)

    def mask(self, count: int) -> Tensor:
        """True = keep, flat, with the `count` least steps pruned."""
        keep = torch.ones_like(self.order, dtype=torch.bool)
        keep.scatter_(1, self.order[:, :count], False)
        return keep.flatten()


def _units(requests: Sequence[MaskRequest]) -> list[_Unit]:
    groups: dict[Hashable, list[MaskRequest]] = defaultdict(list)
    for index, request in enumerate(requests):
        dependency = request.settings.dependency_group_id
        groups[("alone", index) if dependency is None else ("group", dependency)].append(request)
    return [_Unit(members) for members in groups.values()]


def _global_counts(name: str, units: Sequence[_Unit]) -> dict[int, int]:
    ratios = {unit.settings.sparse_ratio for unit in units}
    if len(ratios) != 1 or None in ratios:
        raise ValueError(
            f"the targets of global group {name!r} need one equal sparse_ratio, not {sorted(map(str, ratios))}"
        )
    ratio = next(iter(ratios)) or 0.0
    values = torch.cat([unit.values for unit in units])
    sizes = torch.cat([torch.full((len(unit.values),), unit.step_elements) for unit in units])
    rank = torch.cat([torch.arange(len(unit.values)) for unit in units])
    least, most = (
        torch.cat([torch.full((len(unit.values),), unit.clamps()[side]) for unit in units]) for side in (0, 1)
    )
    budget = _share(int(sizes.sum()), ratio * units[0].fraction)
    forced, allowed = rank < least, (rank >= least) & (rank < most)
    order = values.argsort(stable=True)
    order = order[allowed[order]]
    spent = sizes[order].cumsum(0) + sizes[forced].sum()
    pruned = forced.clone()
    pruned[order[spent <= budget]] = True
    parts = torch.split(pruned, [len(unit.values) for unit in units])
    return {id(unit): int(part.sum()) for unit, part in zip(units, parts, strict=True)}


def _share(total: int, ratio: float) -> int:
    return floor(total * ratio + _ROUNDING)


def _grid(request: MaskRequest) -> list[int]:
    """The numbers of blocks, without the dimensions that have one: a conv's channels are those of a linear layer."""
    return [count for count in request.saliency.shape if count != 1]


def _pinned(request: MaskRequest) -> Tensor:
    saliency = request.saliency.detach().to(device="cpu", dtype=torch.float64)
    if request.pruned is None:
        return saliency
    return saliency.masked_fill(request.pruned.to("cpu"), -torch.inf)
