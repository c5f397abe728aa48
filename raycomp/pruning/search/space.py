"""What a search chooses: a part to prune of each group of targets, under one goal for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import floor
from typing import Any

from raycomp.config import PruneTarget
from raycomp.core.selection import Selected, Selection
from raycomp.core.target import TargetId
from raycomp.errors import ConfigError, Problem
from raycomp.pruning.budget import counts_within, even_keys, masks_of
from raycomp.pruning.masks import Unit, units_of
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.schedule import same_part_each_time

Ratios = tuple[float, ...]
"""The part that each unit of a space loses."""


class SearchSpace:
    """The choices that meet a pruner's goal: its config list's one ratio, over all targets, or its budget.

    Args:
        pruner: ranks by the weights as they are.
        progress: which part of the way to the goal is gone, by the same part of what is left each time.

    Raises:
        ConfigError: targets have different goals, or ones that can't be searched for.
    """

    def __init__(self, pruner: Pruner, progress: float = 1.0) -> None:
        self.selection = pruner.selection
        units = units_of(pruner.requests(pruner.saliencies(), 1.0))
        settings = {id(unit): unit.settings for unit in units}
        goals = {(own.sparse_ratio, own.budget) for own in settings.values()}
        if len(goals) != 1 or goals == {(None, None)}:
            message = "a search shares out one sparse_ratio, or one budget, over all targets"
            raise ConfigError([Problem("config_list", message, "give all entries the same one")])
        self._ratio, budget = next(iter(goals))
        self._limits = None if budget is None else budget.limits()
        self._costs = pruner.costs
        if self._limits is not None:
            assert self._costs is not None
            goes = set(self._costs.channels)
            units = [unit for unit in units if all(key in goes for key in unit.keys)]
            parts = {name: self._costs.part(name, limit) for name, limit in self._limits.items()}
            self._limits = {name: part**progress for name, part in parts.items()}
        if self._ratio is not None:
            self._ratio *= same_part_each_time(progress, self._ratio)
        if not units:
            raise ConfigError([Problem("config_list", "no channel of its targets can be removed")])
        for unit in units:
            # A ratio of its own can't say that all of a target goes.
            unit.may_go_whole = False
        self.units: tuple[Unit, ...] = tuple(units)
        self.names = tuple(unit.name for unit in units)

    def uniform(self) -> Ratios:
        """The same part of all units, as nearly as the goal allows."""
        return self.fitted([0.0] * len(self.units))

    def fitted(self, wanted: Sequence[float]) -> Ratios:
        """The nearest choice that meets the goal: all parts are moved by the same amount, as far as they can be."""
        even = even_keys(self.units)
        keys = [each - part for each, part in zip(even, wanted, strict=True)]
        counts, _ = counts_within(self.units, keys, self._fits)
        return self.ratios(counts)

    def ratios(self, counts: Sequence[int]) -> Ratios:
        """The part of each unit that so many steps are."""
        return tuple(count / len(unit.values) for unit, count in zip(self.units, counts, strict=True))

    def counts(self, ratios: Sequence[float]) -> list[int]:
        """How many steps of each unit these parts are."""
        return [floor(len(unit.values) * part + 1e-9) for unit, part in zip(self.units, ratios, strict=True)]

    def _fits(self, counts: Sequence[int]) -> bool:
        if self._limits is not None:
            assert self._costs is not None
            return self._costs.within(self._limits, masks_of(self.units, counts))
        pruned, wanted = self._elements(counts)
        return pruned >= wanted

    def progress(self, counts: Sequence[int]) -> float:
        """How far these steps come towards the goal: 1 where they meet it."""
        if self._limits is not None:
            assert self._costs is not None
            left = self._costs.of(masks_of(self.units, counts))
            return min((1 - left[name]) / max(1 - limit, 1e-9) for name, limit in self._limits.items())
        pruned, wanted = self._elements(counts)
        return pruned / max(wanted, 1)

    def _elements(self, counts: Sequence[int]) -> tuple[int, int]:
        """How many elements these steps prune, and how many the goal does."""
        assert self._ratio is not None
        pruned = sum(unit.step_elements * count for unit, count in zip(self.units, counts, strict=True))
        return pruned, floor(self._ratio * sum(unit.step_elements * len(unit.values) for unit in self.units) + 1e-9)

    def chosen(self, ratios: Sequence[float]) -> Selection:
        """The pruner's selection with a ratio of its own for each target; what can't go is left as it is."""
        part_of = {key: part for unit, part in zip(self.units, ratios, strict=True) for key in unit.keys}
        weights = {key: TargetId(key.module, "weight") for key in self.selection.selected}
        selected = {
            # A bias that follows its weight says the same.
            key: _with_ratio(item, part_of.get(key, part_of.get(weights[key], 0.0)))
            for key, item in self.selection.selected.items()
        }
        return replace(self.selection, selected=selected)


def _with_ratio(item: Selected, ratio: float) -> Selected:
    settings = item.settings
    assert isinstance(settings, PruneTarget)
    if settings.sparse_ratio is None and settings.budget is None:
        return item
    dropped = ("sparse_ratio", "budget", "global_group_id", "min_sparse_ratio", "max_sparse_ratio")
    kept = {name: value for name, value in settings.given_values().items() if name not in dropped}
    return replace(item, settings=PruneTarget(**kept, sparse_ratio=ratio))


def config_list(selection: Selection) -> list[dict[str, Any]]:
    """A selection as a config list, in which every entry names its modules: what a search found, to be used again."""
    targets: dict[tuple[str, str], list[str]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for target_id, item in selection.selected.items():
        assert isinstance(item.settings, PruneTarget)
        own = item.settings.model_dump(mode="json")
        settings[repr(own)] = own
        targets.setdefault((target_id.module, repr(own)), []).append(target_id.target)
    modules: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (module, own_settings), names in targets.items():
        modules.setdefault((own_settings, tuple(names)), []).append(module)
    return [
        {"op_names": found, "target_names": list(names), **settings[own_settings]}
        for (own_settings, names), found in modules.items()
    ]
