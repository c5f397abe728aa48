"""First-order Taylor pruning."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.batch_share import is_idle
from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.model import device_of
from raycomp.core.reduction import Statistic, restored_statistics, statistics_state, world_size
from raycomp.core.target import TargetId
from raycomp.core.watching import in_training_step
from raycomp.pruning.bases.watched import BlockWatcher, WatchingPruner
from raycomp.pruning.saliency import taylor


class BlockGradients(BlockWatcher):
    """Σ (a·g)² over each block of an input or output, over all samples; arguments as `BlockWatcher`."""

    def update(self, value: Tensor) -> None:
        """Nothing yet: the gradient comes in the backward pass."""

    def forward(self, value: Tensor) -> None:
        super().forward(value)
        if self.gathers and in_training_step() and value.requires_grad and not is_idle():
            value.register_hook(partial(self._add, value.detach()))

    def _add(self, value: Tensor, gradient: Tensor) -> None:
        # The loss is weighted so that the mean over the ranks is the global batch's.
        value, gradient = value.to(self.sum.dtype), gradient.to(self.sum.dtype) / world_size()
        self.sum.add_(taylor(value, gradient, self.blocks_of(value)))


class TaylorPruner(WatchingPruner):
    """Prunes the blocks with the smallest Σ (w·g)² over the last `training_steps` steps.

    The gradient is the optimizer's: taken after the all-reduce of DDP and over all accumulated micro-batches, so it is
    that of the global batch on any number of workers. Of inputs and outputs it is Σ (a·g)² over the samples, too. A
    threshold is such a sum (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: how to train.
        training_steps: how many steps' saliencies are summed before a decision.
    """

    fusion_order = ("training_steps", "evaluator")
    ranks_values = True

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 100,
    ) -> None:
        self.sums: dict[TargetId, Statistic] = {}
        super().__init__(model, config_list, evaluator, training_steps)

    def watcher(self, target_id: TargetId) -> tuple[TargetId, BlockWatcher] | None:
        is_parameter = self.layouts[target_id].is_parameter
        return None if is_parameter else (target_id, BlockGradients(str(target_id), self.grid(target_id)))

    def before_step(self, step: int) -> None:
        """Adds (w·g)² of this step, where a decision within `training_steps` steps rests on it."""
        super().before_step(step)
        if not self.schedule.gathers(step, self.window):
            return
        for target_id in self._parameters:
            parameter = self.chain.space.parameter(target_id)
            if parameter.grad is not None:
                saliency = taylor(parameter, parameter.grad, self.blocks(target_id))
                self._sum(target_id).tensor.add_(saliency)

    def statistics(self) -> list[Statistic]:
        # Under DDP all workers have the same gradient: their mean it is.
        return [*super().statistics(), *(self._sum(target_id) for target_id in self._parameters)]

    def running_statistics(self) -> list[Statistic]:
        return [*super().statistics(), *self.sums.values()]

    def of_watched(self, target_id: TargetId, watcher: BlockWatcher) -> Tensor:
        return watcher.sum

    def of_unwatched(self, target_id: TargetId) -> Tensor:
        return self._sum(target_id).tensor

    def rewind(self) -> None:
        super().rewind()
        self.sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": statistics_state({str(key): each for key, each in self.sums.items()})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        found = restored_statistics(state["sums"], device_of(self.model))
        self.sums = {key: found[str(key)] for key in self.goals if str(key) in found}

    @property
    def _parameters(self) -> list[TargetId]:
        return [target_id for target_id in self.goals if target_id not in self.watchers]

    def _sum(self, target_id: TargetId) -> Statistic:
        if target_id not in self.sums:
            parameter = self.chain.space.parameter(target_id)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            zeros = torch.zeros(self.grid(target_id), dtype=dtype, device=parameter.device)
            self.sums[target_id] = Statistic(zeros, "mean", f"Taylor saliency of {target_id}")
        return self.sums[target_id]
