"""Movement pruning."""

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
from raycomp.core.mask import Mask
from raycomp.core.masks import ApplyMethod
from raycomp.core.target import TargetId
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import expand_blocks
from raycomp.pruning.schedule import Between, Schedule, agp


class _StraightThrough(torch.autograd.Function):
    """A masked value whose gradient goes on to the scores of its blocks, too, as if these multiplied the value."""

    @staticmethod
    def forward(ctx: Any, masked: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        ctx.scores = scores.shape, scores.dtype
        return masked.view_as(masked)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        shape, dtype = ctx.scores
        return gradient, None, (gradient * value).sum_to_size(shape).to(dtype)


class ScoredMask(Mask, Learns):
    """A mask whose gradient goes, straight through, to a learned score of each block.

    Args:
        shape, method: as `Mask`.
        grid: blocks in each dimension.
        blocks: the size of a block in each dimension.
        dtype: of the scores.
    """

    scores: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        method: ApplyMethod,
        grid: Sequence[int],
        blocks: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(shape, method, has_rank=True)
        # One block alone broadcasts, also where a batch is of another size than the example's.
        self.repeats = tuple(1 if count == 1 else block for count, block in zip(grid, blocks, strict=True))
        self.register_learned("scores", torch.zeros(tuple(grid), dtype=dtype))

    def forward(self, value: Tensor) -> Tensor:
        """The masked value; ∂loss/∂score is that of a score which multiplied the whole block."""
        masked = super().forward(value)
        if not torch.is_grad_enabled():
            return masked
        scores = expand_blocks(self.scores, self.repeats)
        through: Tensor = _StraightThrough.apply(masked, value.detach(), scores)  # type: ignore[no-untyped-call]
        return through


class MovementPruner(Pruner):
    """Learns a score for each block, which grows as its weights move away from zero, and keeps the highest.

    From `warmup_step` to `cooldown_begin_step` the masks are made anew after every step, for the part 1 − (1 − t/T)³ of
    the goal; a block that was pruned may come back. A score's gradient is Σ (∂loss/∂W ⊙ W), straight through the mask.
    Targets with a `sparse_threshold` keep where sigmoid(score) is at least that, under a penalty of `regular_scale` ·
    the mean of sigmoid(score), which grows with the same curve (Sanh et al., Movement Pruning, arXiv:2005.07683).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: how to train.
        warmup_step: optimizer steps in which scores are learned and nothing is masked.
        cooldown_begin_step: the step of the last decision.
        regular_scale: the weight of the penalty.
    """

    fusion_order = ("warmup_step", "cooldown_begin_step", "regular_scale", "evaluator")
    grows_back = True
    ranks_values = True

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        warmup_step: int = 0,
        cooldown_begin_step: int = 100,
        regular_scale: float = 1.0,
    ) -> None:
        self.warmup_step = warmup_step
        self.cooldown_begin_step = cooldown_begin_step
        self.regular_scale = regular_scale
        super().__init__(model, config_list, evaluator)

    def own_schedule(self) -> Schedule:
        return Between(self.warmup_step, self.cooldown_begin_step, agp)

    def make_mask(self, target_id: TargetId) -> Mask:
        plain = super().make_mask(target_id)
        if target_id not in self.goals:
            return plain
        dtype = torch.float32
        if self.layouts[target_id].is_parameter:
            dtype = torch.promote_types(self.chain.space.parameter(target_id).dtype, dtype)
        shape = tuple(plain.mask.shape)
        return ScoredMask(shape, plain.method, self.grid(target_id), self.blocks(target_id), dtype)

    def attach(self) -> None:
        super().attach()
        for target_id in self.goals:
            self.chain.learned.add(self._scored(target_id).learned().values())

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The scores; their sigmoids where there is a threshold."""
        return {key: self._scale(key, self._scored(key).scores.detach()) for key in self.goals}

    def loss_term(self, batch: Any) -> Tensor | None:
        """The penalty on the scores of targets with a threshold."""
        means = [self._scale(key, self._scored(key).scores).mean() for key in self.goals if self._has_threshold(key)]
        progress = (self.chain.step - self.warmup_step) / (self.cooldown_begin_step - self.warmup_step)
        if not means or progress <= 0:
            return None
        return weighted_by_samples(self.regular_scale * agp(min(progress, 1.0), 1.0) * torch.stack(means).mean())

    def _scored(self, target_id: TargetId) -> ScoredMask:
        mask = self.masks[target_id]
        assert isinstance(mask, ScoredMask)
        return mask

    def _scale(self, target_id: TargetId, scores: Tensor) -> Tensor:
        return scores.sigmoid() if self._has_threshold(target_id) else scores

    def _has_threshold(self, target_id: TargetId) -> bool:
        return self._settings(target_id).sparse_threshold is not None
