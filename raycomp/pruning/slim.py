"""Network slimming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.batch_share import weighted_by_samples
from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.learned import Learns
from raycomp.core.model import device_of
from raycomp.core.target import TargetId
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import expand_blocks


class Factor(Learns):
    """A learned factor for each block of a target.

    Args:
        grid: blocks in each dimension.
        blocks: the size of a block in each dimension.
        dtype: of the factors.
    """

    factor: Tensor

    def __init__(self, grid: Sequence[int], blocks: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.register_learned("factor", torch.ones(tuple(grid), dtype=dtype))

    def forward(self, value: Tensor) -> Tensor:
        """The value times its blocks' factors."""
        return value * expand_blocks(self.factor, self.blocks).to(value.dtype)


class SlimPruner(Pruner):
    """Learns a factor for each block, which a penalty draws to zero, and prunes the blocks with the least.

    The factors multiply their targets, usually the weights of batch norms; until the last decision the loss has the
    term `regular_scale` · Σ over targets of Σ |factor| / number of targets. Afterwards the factors go on training, and
    end up in the weights (Liu et al., Learning Efficient Convolutional Networks through Network Slimming,
    arXiv:1708.06519).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: how to train.
        training_steps: steps before the decision.
        regular_scale: the weight of the penalty.
    """

    fusion_order = ("training_steps", "regular_scale", "evaluator")

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 100,
        regular_scale: float = 1.0,
    ) -> None:
        self.training_steps = training_steps
        self.regular_scale = regular_scale
        self.factors: dict[TargetId, Factor] = {}
        super().__init__(model, config_list, evaluator)

    @property
    def window(self) -> int:
        return self.training_steps

    def attach(self) -> None:
        for target_id in self.goals:
            if target_id not in self.factors:
                dtype = torch.promote_types(self.chain.space.parameter(target_id).dtype, torch.float32)
                factor = Factor(self.grid(target_id), self.blocks(target_id), dtype).to(device_of(self.model))
                self.factors[target_id] = factor
                self.chain.learned.add(factor.learned().values())
            self.chain.space.target(target_id).add("factors", self.factors[target_id])
        super().attach()

    def loss_term(self, batch: Any) -> Tensor | None:
        """The penalty."""
        if self.schedule.is_over(self.chain.step, self.chain.round):
            return None
        norms = [factor.factor.abs().sum() for factor in self.factors.values()]
        return weighted_by_samples(self.regular_scale * torch.stack(norms).sum() / len(norms))

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The magnitude of each block's factor."""
        return {target_id: factor.factor.detach().abs() for target_id, factor in self.factors.items()}

    @torch.no_grad()
    def commit(self) -> None:
        """Multiplies the factors into the weights, and zeroes what is masked."""
        for target_id, factor in self.factors.items():
            parameter = self.chain.space.parameter(target_id)
            parameter.copy_(factor(parameter))
            factor.factor.fill_(1.0)
        super().commit()
