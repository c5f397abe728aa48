"""From saliencies to masks: dependency groups share one; then threshold or ratio, alone or ranked over a global group.

Pure functions, no model and no lifecycle.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raycomp.config import PruneTarget
from raycomp.pruning.budget import Costs, counts_within, even_keys, masks_of, ranked_keys

_ROUNDING = 1e-9
"""Keeps 0.29 × 100 from being 28."""

_ALIKE = 16
"""Roundings by which saliencies that are the same may differ."""


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


class Decision(NamedTuple):
    """Masks, and what their user should know of them.

    Args:
        masks: a boolean mask per request, True = keep, in the shape of its saliency.
        notes: what was not done as the goal says.
    """

    masks: dict[Hashable, Tensor]
    notes: tuple[str, ...]


def make_masks(requests: Sequence[MaskRequest], costs: Costs | None = None) -> Decision:
    """The masks of all requests.

    Targets of one dependency group share a mask (made from their mean saliency); targets of one global group are ranked
    together, ties going by the order of the requests and then by index. The clamps hold for each target in every mode.
    A target is masked whole only where its `max_sparse_ratio` is 1, and one whose blocks all have the same saliency is
    left as it is by a ratio: nothing says which of them matters less. Targets with a budget lose the same part each, or
    go by rank where they are of one global group, until what stays is within it.

    Args:
        requests: one for each target.
        costs: what masks cost, where there is a budget.

    Raises:
        ValueError: members of a group whose shapes, ratios or block counts don't fit each other.
    """
    units = units_of(requests)
    undecided = [unit for unit in units if unit.is_undecided]
    counts = {id(unit): unit.pinned for unit in undecided}
    decided = [unit for unit in units if unit not in undecided]
    others = [unit for unit in decided if unit.settings.budget is None]
    counts |= _counts(others)
    spared = _spared(others, counts)
    budgeted = [unit for unit in decided if unit.settings.budget is not None]
    beside = [unit for unit in units if unit not in budgeted] if budgeted else []
    found, notes = _budgeted(budgeted, costs, masks_of(beside, [counts[id(unit)] for unit in beside]))
    counts |= found
    made: dict[Hashable, Tensor] = {}
    for unit in units:
        mask = unit.mask(counts[id(unit)])
        made |= {member.key: mask.view(member.saliency.shape) for member in unit.members}
    notes += [f"{unit.name}: all saliencies are the same, so nothing of it is masked" for unit in undecided]
    notes += [
        f"{unit.name}: all of it would be masked, so a block stays (unless max_sparse_ratio: 1)" for unit in spared
    ]
    return Decision(made, tuple(notes))


def _budgeted(
    units: Sequence[Unit], costs: Costs | None, beside: Mapping[Hashable, Tensor]
) -> tuple[dict[int, int], list[str]]:
    """How many steps each unit prunes that has a budget, beside the masks of those without; and what the user should
    know."""
    if not units:
        return {}, []
    assert costs is not None
    budget, ranked = units[0].settings.budget, units[0].settings.global_group_id is not None
    assert budget is not None
    if any((unit.settings.budget, unit.settings.global_group_id is not None) != (budget, ranked) for unit in units):
        raise ValueError(
            "a budget is the whole model's: its targets need one and the same, all in global groups or none"
        )
    stays = [unit for unit in units if any(key not in costs.channels for key in unit.keys)]
    goes = [unit for unit in units if unit not in stays]
    counts = {id(unit): unit.pinned for unit in stays}
    if not goes:
        raise ValueError("a budget is given, and no channel of its targets can be removed")
    if budget.is_timed:
        raise ValueError("a latency is measured in a job: run it as one, or give a budget of macs")
    limits = costs.due(budget.limits(), goes[0].fraction)
    keys = ranked_keys(goes) if ranked else even_keys(goes)
    fixed = {key: mask for key, mask in beside.items() if key in costs.channels}
    found, is_met = counts_within(goes, keys, lambda counts: costs.within(limits, fixed | masks_of(goes, counts)))
    notes = [] if is_met else [f"the budget {budget.limits()} can't be met: all that may go is masked"]
    return counts | {id(unit): count for unit, count in zip(goes, found, strict=True)}, notes


def _counts(units: Sequence[Unit]) -> dict[int, int]:
    """How many steps each unit prunes."""
    counts = {id(unit): unit.wanted() for unit in units if unit.settings.global_group_id is None}
    groups: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if unit.settings.global_group_id is not None:
            groups[unit.settings.global_group_id].append(unit)
    for name, members in groups.items():
        counts |= _global_counts(name, members)
    return counts


def _spared(units: Sequence[Unit], counts: Mapping[int, int]) -> list[Unit]:
    """The units of which a block is kept that their goal would take."""
    kept = [unit for unit in units if not unit.may_go_whole and counts[id(unit)] == len(unit.values) - 1]
    if not kept:
        return []
    for unit in units:
        unit.may_go_whole = True
    unspared = _counts(units)
    return [unit for unit in kept if unspared[id(unit)] == len(unit.values)]


class Unit:
    """Targets that share one mask, which grows in steps: of one block of each target; with `internal_metric_block`, of
    the j-th least block of every part."""

    def __init__(self, members: Sequence[MaskRequest]) -> None:
        self.members = members
        self.settings = members[0].settings
        self.fraction = members[0].fraction
        self._check()
        self.blocks = math.lcm(*(member.settings.internal_metric_block or 1 for member in members))
        saliency = _mean([_pinned(member).flatten() for member in members])
        if saliency.numel() % self.blocks:
            raise ValueError(
                f"internal_metric_block {self.blocks} doesn't divide the {saliency.numel()} blocks of {members[0].key}"
            )
        self.saliency = saliency.view(self.blocks, -1)
        self.may_go_whole = any(member.settings.max_sparse_ratio == 1 for member in members)
        self.step_elements = self.blocks * sum(member.elements for member in members)

    @cached_property
    def values(self) -> Tensor:
        """The value of each step; with internal blocks in ascending order, else that of the blocks."""
        return self.saliency[0] if self.blocks == 1 else self.saliency.double().sort(dim=1).values.mean(dim=0)

    @property
    def keys(self) -> list[Hashable]:
        """Its targets."""
        return [member.key for member in self.members]

    @property
    def name(self) -> str:
        """Its targets'."""
        return ", ".join(str(member.key) for member in self.members)

    @cached_property
    def pinned(self) -> int:
        """The number of steps that are pruned already and stay so."""
        if all(member.pruned is None for member in self.members):
            return 0
        return int((self.values == -torch.inf).sum())

    @property
    def is_undecided(self) -> bool:
        """Whether a ratio would have to choose among steps of the same saliency alone."""
        if self.settings.sparse_threshold is not None or len(self.values) - self.pinned < 2:
            return False
        alive = self.values[self.values > -torch.inf] if self.pinned else self.values
        low, high = torch.stack(alive.aminmax()).tolist()
        # Sums of the same numbers in another order differ by rounding.
        if high - low > torch.finfo(self.saliency.dtype).eps * _ALIKE * max(abs(low), abs(high)):
            return False
        is_shared_goal = self.settings.global_group_id is not None or self.settings.budget is not None
        return is_shared_goal or self.wanted() > self.pinned

    def _check(self) -> None:
        first = self.members[0]
        for member in self.members[1:]:
            if _grid(member) != _grid(first):
                shapes = tuple(first.saliency.shape), tuple(member.saliency.shape)
                raise ValueError(f"{first.key} and {member.key} share a dependency group, but have {shapes} blocks")
            for name in ("sparse_ratio", "sparse_threshold", "budget", "global_group_id"):
                if getattr(member.settings, name) != getattr(first.settings, name):
                    raise ValueError(f"{first.key} and {member.key} share a dependency group, but differ in {name}")

    def clamps(self) -> tuple[int, int]:
        """The least and the greatest number of steps that may be pruned; what is pruned already stays so."""
        least = max(member.settings.min_sparse_ratio or 0.0 for member in self.members)
        given = [member.settings.max_sparse_ratio for member in self.members]
        ratio = min([ratio for ratio in given if ratio is not None], default=1.0)
        most = min(_part(len(self.values), ratio), len(self.values) - (not self.may_go_whole))
        return max(_part(len(self.values), least * self.fraction), self.pinned), max(most, self.pinned)

    def wanted(self) -> int:
        """The number of steps to prune by threshold or ratio, clamped."""
        threshold, ratio = self.settings.sparse_threshold, self.settings.sparse_ratio
        if threshold is not None:
            count = int((self.values.double() < threshold * self.fraction).sum())
        else:
            count = _part(len(self.values), (ratio or 0.0) * self.fraction)
        least, most = self.clamps()
        return min(max(count, least), most)

    def mask(self, count: int) -> Tensor:
        """True = keep, flat, with the `count` least of every internal block pruned."""
        if self.blocks == 1:
            return ~least(self.saliency[0], count)
        order = self.saliency.sort(dim=1, stable=True).indices
        keep = torch.ones_like(self.saliency, dtype=torch.bool)
        return keep.scatter_(1, order[:, :count], False).flatten()


def least(values: Tensor, count: int) -> Tensor:
    """True at the `count` least of `values` [n]; of equal ones the first go first."""
    if count <= 0 or count >= len(values):
        return torch.full_like(values, count > 0, dtype=torch.bool)
    # Not kthvalue, which refuses GPU tensors where deterministic algorithms are asked for.
    border = values.topk(count, largest=False, sorted=False).values.max()
    chosen = values < border
    equal = (values == border).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen


def _mean(saliencies: Sequence[Tensor]) -> Tensor:
    return saliencies[0] if len(saliencies) == 1 else torch.stack([each.double() for each in saliencies]).mean(dim=0)


def units_of(requests: Sequence[MaskRequest]) -> list[Unit]:
    """The targets that share a mask each; errors as in `make_masks`."""
    groups: dict[Hashable, list[MaskRequest]] = defaultdict(list)
    for index, request in enumerate(requests):
        dependency = request.settings.dependency_group_id
        groups[("alone", index) if dependency is None else ("group", dependency)].append(request)
    return [Unit(members) for members in groups.values()]


def _global_counts(name: str, units: Sequence[Unit]) -> dict[int, int]:
    ratios = {unit.settings.sparse_ratio for unit in units}
    if len(ratios) != 1 or None in ratios:
        raise ValueError(
            f"the targets of global group {name!r} need one equal sparse_ratio, not {sorted(map(str, ratios))}"
        )
    budget = _part(
        sum(len(unit.values) * unit.step_elements for unit in units), (ratios.pop() or 0.0) * units[0].fraction
    )
    race = _Race(units)
    border = race.border(budget)
    counts = race.counts(border, "left")
    spent = race.spent(counts)
    for index, most in enumerate(race.counts(border, "right")):
        # Of what lies at the border, the first targets' go as far as the budget goes.
        steps = max(min(most - counts[index], (budget - spent) // units[index].step_elements), 0)
        counts[index] += steps
        spent += steps * units[index].step_elements
        if counts[index] < most:
            break
    return {id(unit): count for unit, count in zip(units, counts, strict=True)}


class _Race:
    """Units whose steps go by their values, the least first, within the clamps of each."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.clamps = [unit.clamps() for unit in units]
        # NumPy's sort of values alone is many times quicker than torch's, which finds their order, too.
        self.ascending = [np.sort(unit.values.double().cpu().numpy()) for unit in units]

    def counts(self, border: float, side: Literal["left", "right"]) -> list[int]:
        """How many steps of each unit go where all below the border do; with side `right`, those at it, too."""
        return [
            min(max(int(values.searchsorted(border, side)), least), most)
            for values, (least, most) in zip(self.ascending, self.clamps, strict=True)
        ]

    def spent(self, counts: Sequence[int]) -> int:
        """The elements of so many steps."""
        return sum(count * unit.step_elements for count, unit in zip(counts, self.units, strict=True))

    def border(self, budget: int) -> float:
        """The least value whose steps can't all go, those below it gone, within the budget; inf where all can."""
        finite = [values[np.isfinite(values)] for values in self.ascending]
        low = min((float(values[0]) for values in finite if len(values)), default=0.0)
        high = max((float(values[-1]) for values in finite if len(values)), default=0.0)
        if self.spent(self.counts(high, "right")) <= budget:
            return math.inf
        low = math.nextafter(low, -math.inf)
        while math.nextafter(low, high) < high:
            middle = low / 2 + high / 2
            if self.spent(self.counts(middle, "right")) <= budget:
                low = middle
            else:
                high = middle
        return high


def _part(total: int, ratio: float) -> int:
    return math.floor(total * ratio + _ROUNDING)


def _grid(request: MaskRequest) -> list[int]:
    """The numbers of blocks, without the dimensions that have one: a conv's channels are those of a linear layer."""
    return [count for count in request.saliency.shape if count != 1]


def _pinned(request: MaskRequest) -> Tensor:
    saliency = request.saliency.detach()
    if request.pruned is None:
        return saliency
    return saliency.masked_fill(request.pruned.to(saliency.device), -torch.inf)
