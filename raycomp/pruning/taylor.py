"""First-order Taylor pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.reduction import Statistic, world_size
from raycomp.core.target import TargetId
from raycomp.evaluators.plain import TorchEvaluator
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

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: TorchEvaluator | None = None,
        training_steps: int = 100,
    ) -> None:
        self.training_steps = training_steps
        self.sums: dict[TargetId, Tensor] = {}
        super().__init__(model, config_list, evaluator)

    @classmethod
    def from_compressor(cls, compressor: Any, config_list: ConfigList, *args: Any, **kwargs: Any) -> TaylorPruner:
        """As `Compressor.from_compressor`; NNI's order `(compressor, config_list, training_steps, evaluator)` holds."""
        if args and isinstance(args[0], int):
            training_steps, *rest = args
            kwargs = {"training_steps": training_steps, **({"evaluator": rest[0]} if rest else {}), **kwargs}
            args = ()
        return cls(compressor.chain, config_list, *args, **kwargs)

    @property
    def window(self) -> int:
        return self.training_steps

    def before_step(self, step: int) -> None:
        """Adds (w·g)² of this step, where a decision within `training_steps` steps rests on it."""
        if not any(decision.step - self.window < step <= decision.step for decision in self.schedule):
            return
        for target_id in self.goals:
            parameter = self.chain.space.parameter(target_id)
            if parameter.grad is not None:
                saliency = taylor(parameter, parameter.grad, self.blocks(target_id))
                self._sum(target_id).add_(saliency)

    def statistics(self) -> list[Statistic]:
        if self._decision(self.chain.step) is None:
            return []
        return [Statistic(self._sum(target_id), "sum") for target_id in self.goals]

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The mean over the workers, which under DDP all have the same; the sums begin anew."""
        sums = {target_id: self._sum(target_id) / world_size() for target_id in self.goals}
        self.sums.clear()
        return sums

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {str(key): value for key, value in self.sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["sums"]
        self.sums = {key: saved[str(key)].to(self._sum(key)) for key in self.goals if str(key) in saved}

    def _sum(self, target_id: TargetId) -> Tensor:
        if target_id not in self.sums:
            parameter = self.chain.space.parameter(target_id)
            blocks = self.blocks(target_id)
            grid = [dim // block for dim, block in zip(parameter.shape, blocks, strict=True)]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self.sums[target_id] = torch.zeros(grid, dtype=dtype, device=parameter.device)
        return self.sums[target_id]
