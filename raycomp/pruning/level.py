"""Level pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.selection import Selected
from raycomp.core.target import TargetId
from raycomp.errors import Problem
from raycomp.pruning.bases.magnitude import MagnitudePruner
from raycomp.pruning.masks import MaskRequest
from raycomp.pruning.saliency import block_elements, block_vectors, from_block_vectors, l1_norm, padded_sizes


class LevelPruner(MagnitudePruner):
    """Prunes the single weights with the smallest magnitude, or with a granularity the blocks with the smallest sum.

    In mode `balance` the same number goes in every block of `balance_gran` weights: with [4] and a ratio of 0.5, two of
    every four that follow each other in the last dimension; with [4, 1, 1], of four input channels of a 2d convolution,
    which is the 2:4 that hardware multiplies twice as fast. A threshold is a magnitude.

    Args:
        model, config_list, evaluator, training_steps: see `MagnitudePruner`.
        mode: `normal`, or `balance`.
        balance_gran: in mode `balance`, the size of the blocks in the last dimensions (-1: the whole dimension).
    """

    fusion_order = ("mode", "balance_gran", "evaluator", "training_steps")
    default_granularity = (1,)
    power = 1

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        mode: Literal["normal", "balance"] = "normal",
        balance_gran: Sequence[int] | None = None,
        training_steps: int = 0,
    ) -> None:
        self.mode = mode
        self.balance_gran = balance_gran
        super().__init__(model, config_list, evaluator, training_steps)

    def of_weights(self, weight: Tensor, blocks: Sequence[int]) -> Tensor:
        return l1_norm(weight, blocks)

    def ranked(self, target_id: TargetId, values: Tensor) -> Tensor:
        return values if self.mode == "normal" else block_vectors(values, self._balanced(target_id))

    def from_ranked(self, target_id: TargetId, values: Tensor) -> Tensor:
        grid = self.grid(target_id)
        if self.mode == "normal":
            return values.view(grid)
        return from_block_vectors(values, grid, self._balanced(target_id))

    def _balanced(self, target_id: TargetId) -> tuple[int, ...]:
        """How many entries of the grid in each dimension make one balanced block."""
        grid = self.grid(target_id)
        assert self.balance_gran is not None
        sizes = padded_sizes(self.balance_gran, grid)
        whole = tuple(count if size == -1 else size for size, count in zip(sizes, grid, strict=True))
        if any(count % size for size, count in zip(whole, grid, strict=True)):
            raise ValueError(f"balance_gran {whole} doesn't divide its {tuple(grid)} blocks")
        return whole

    def _request(self, target_id: TargetId, saliency: Tensor, progress: float) -> MaskRequest:
        request = super()._request(target_id, saliency, progress)
        if self.mode == "normal":
            return request
        rows = self.count(target_id) // block_elements(self._balanced(target_id))
        return replace(request, settings=request.settings.model_copy(update={"internal_metric_block": rows}))

    def _goal_problems(self, target_id: TargetId, selected: Selected) -> list[Problem]:
        problems = super()._goal_problems(target_id, selected)
        if self.mode == "balance" and not problems:
            try:
                self._balanced(target_id)
            except ValueError as error:
                problems.append(Problem(selected.where, f"{target_id}: {error}", "exclude the module"))
        return problems
