"""Group Taylor pruning."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.model import device_of
from raycomp.core.reduction import Statistic, restored_statistics, statistics_state
from raycomp.core.target import TargetId
from raycomp.pruning.bases.coupled import CoupledPruner
from raycomp.pruning.saliency import block_sum


class GroupTaylorPruner(CoupledPruner):
    """Prunes the channels with the smallest Σ (w·g)², over all weights that go with them in all layers, and over the
    last `training_steps` steps.

    A threshold is such a sum (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019; over
    groups: Fang et al., DepGraph, CVPR 2023, arXiv:2301.12900). Gradients are as in `TaylorPruner`.

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: how to train; gives the example input that the model is traced with (`dummy_input`).
        training_steps: how many steps' saliencies are summed before a decision.
    """

    fusion_order = ("training_steps", "evaluator")

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 100,
    ) -> None:
        self.training_steps = training_steps
        self.sums: dict[str, Statistic] = {}
        super().__init__(model, config_list, evaluator)

    @property
    def window(self) -> int:
        return self.training_steps

    def before_step(self, step: int) -> None:
        """Adds (w·g)² of this step, where a decision within `training_steps` steps rests on it."""
        if not self.schedule.gathers(step, self.window):
            return
        sums = self._gathered()
        sums["channels"].tensor.add_(self.summed(_squares))
        for target_id in self._alone:
            squares = _squares(self.chain.space.parameter(target_id))
            if squares is not None:
                sums[str(target_id)].tensor.add_(block_sum(squares, self.blocks(target_id)))

    def statistics(self) -> list[Statistic]:
        # Under DDP all workers have the same gradient: their mean it is.
        return list(self._gathered().values())

    def running_statistics(self) -> list[Statistic]:
        return list(self.sums.values())

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The mean over the workers, which under DDP all have the same; the sums begin anew."""
        sums = self._gathered()
        found = {}
        for target_id in self.goals:
            own = self.of_channels(target_id, sums["channels"].tensor)
            found[target_id] = sums[str(target_id)].tensor if own is None else own
        self.sums = {}
        return found

    def rewind(self) -> None:
        self.sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": statistics_state(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = restored_statistics(state["sums"], device_of(self.model))

    @cached_property
    def _alone(self) -> list[TargetId]:
        """The targets whose channels can't go."""
        none = torch.zeros(len(self.coupling.cells))
        return [target_id for target_id in self.goals if self.of_channels(target_id, none) is None]

    def _gathered(self) -> dict[str, Statistic]:
        if not self.sums:
            channels = self.summed(lambda _: None)
            grids = {str(target_id): channels.new_zeros(self.grid(target_id)) for target_id in self._alone}
            tensors = {"channels": channels, **grids}
            self.sums = {name: Statistic(each, "mean", f"Taylor saliency of {name}") for name, each in tensors.items()}
        return self.sums


def _squares(parameter: nn.Parameter) -> Tensor | None:
    return None if parameter.grad is None else (parameter.detach() * parameter.grad.detach()).square()
