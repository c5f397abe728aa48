"""Random pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomp.core.target import TargetId
from raycomp.pruning.pruner import Pruner


class RandomPruner(Pruner):
    """Prunes blocks drawn at random, the same ones on every worker: what any other pruner has to be better than.

    It decides before the first training step. A threshold is a number from 0 to 1: how likely a block is pruned.

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: only for what is fused with it.
    """

    ranks_values = True

    def saliencies(self) -> dict[TargetId, Tensor]:
        """Numbers between 0 and 1, from the chain's generator."""
        return {key: torch.rand(self.grid(key), generator=self.chain.generator) for key in self.goals}
