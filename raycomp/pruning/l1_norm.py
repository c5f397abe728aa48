"""L1 norm pruning."""

from __future__ import annotations

from torch import Tensor

from raycomp.core.target import TargetId
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import l1_norm


class L1NormPruner(Pruner):
    """Prunes the blocks (by default the output channels) with the smallest L1 norm of their weights.

    The decision falls before the first training step, so that a training fused with it already sees the masks
    (Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: only for what is fused with it.
    """

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The L1 norm of each block of the weights as they are."""
        return {key: l1_norm(self.chain.space.parameter(key), self.blocks(key)) for key in self.goals}
