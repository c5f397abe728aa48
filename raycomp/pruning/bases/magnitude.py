"""Pruners that rank by the size of values: the base of those by a norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from raycomp.core.selection import Selected
from raycomp.core.target import TargetId
from raycomp.errors import Problem
from raycomp.pruning.bases.watched import BlockMeans, BlockWatcher, WatchingPruner


class MagnitudePruner(WatchingPruner):
    """Ranks parameters by their weights, and inputs and outputs by what passes during `training_steps` steps.

    Without inputs or outputs among its targets it decides before the first training step, unless `training_steps` says
    otherwise, so that a training fused with it already sees the masks.

    Args:
        model, config_list, evaluator: see `Pruner`.
        training_steps: optimizer steps before the decision; at least 1 where inputs or outputs are ranked.
    """

    fusion_order: ClassVar[tuple[str, ...]] = ("evaluator", "training_steps")
    ranks_values = True
    power: ClassVar[Literal[1, 2]]
    """Of the magnitudes of an input's or output's entries: their mean over a block is what is ranked."""

    @abstractmethod
    def of_weights(self, weight: Tensor, blocks: Sequence[int]) -> Tensor:
        """The saliency of each block of a parameter."""

    def of_means(self, means: Tensor) -> Tensor:
        """The saliency of each block of an input or output, from the mean of `power` over its entries."""
        return means

    def watcher(self, target_id: TargetId) -> tuple[TargetId, BlockWatcher] | None:
        if self.layouts[target_id].is_parameter:
            return None
        function = torch.abs if self.power == 1 else torch.square
        return target_id, BlockMeans(str(target_id), self.grid(target_id), function)

    def of_watched(self, target_id: TargetId, watcher: BlockWatcher) -> Tensor:
        assert isinstance(watcher, BlockMeans)
        return self.of_means(watcher.mean())

    def of_unwatched(self, target_id: TargetId) -> Tensor:
        return self.of_weights(self.chain.space.parameter(target_id).detach(), self.blocks(target_id))

    def _goal_problems(self, target_id: TargetId, selected: Selected) -> list[Problem]:
        problems = super()._goal_problems(target_id, selected)
        if not self.layouts[target_id].is_parameter and not self.training_steps:
            message = f"{target_id} is ranked by what passes through it in training"
            problems.append(Problem(selected.where, message, "give training_steps: how many steps are watched"))
        return problems
