"""First-order Taylor pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.model import device_of
from raycomp.core.reduction import Statistic, restored_statistics, statistics_state
from raycomp.core.target import TargetId
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import taylor


class TaylorPruner(Pruner):
    """Prunes the blocks with the smallest Σ (w·g)² over the last `training_steps` steps.

    The gradient is the optimizer's: taken after the all-reduce of DDP and over all accumulated micro-batches, so it is
    that of the global batch on any number of workers (Molchanov et al., Importance Estimation for Neural Network
    Pruning, CVPR 2019).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: how to train.
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
        self.sums: dict[TargetId, Statistic] = {}
        super().__init__(model, config_list, evaluator)

    @property
    def window(self) -> int:
        return self.training_steps

    def before_step(self, step: int) -> None:
        """Adds (w·g)² of this step, where a decision within `training_steps` steps rests on it."""
        if not self.schedule.gathers(step, self.window):
            return
        for target_id in self.goals:
            parameter = self.chain.space.parameter(target_id)
            if parameter.grad is not None:
                saliency = taylor(parameter, parameter.grad, self.blocks(target_id))
                self._sum(target_id).tensor.add_(saliency)

    def statistics(self) -> list[Statistic]:
        return [self._sum(target_id) for target_id in self.goals]

    def running_statistics(self) -> list[Statistic]:
        return list(self.sums.values())

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The mean over the workers, which under DDP all have the same; the sums begin anew."""
        found = {target_id: self._sum(target_id).tensor for target_id in self.goals}
        self.sums = {}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"sums": statistics_state({str(key): value for key, value in self.sums.items()})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = restored_statistics(state["sums"], device_of(self.model))
        self.sums = {key: found[str(key)] for key in self.goals if str(key) in found}

    def _sum(self, target_id: TargetId) -> Statistic:
        if target_id not in self.sums:
            parameter = self.chain.space.parameter(target_id)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            zeros = torch.zeros(self.grid(target_id), dtype=dtype, device=parameter.device)
            self.sums[target_id] = Statistic(zeros, "mean", f"Taylor saliency of {target_id}")
        return self.sums[target_id]
