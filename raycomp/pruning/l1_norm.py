"""L1 norm pruning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raycomp.pruning.bases.magnitude import MagnitudePruner
from raycomp.pruning.saliency import l1_norm


class L1NormPruner(MagnitudePruner):
    """Prunes the blocks (by default the output channels) with the smallest L1 norm of their weights.

    Of inputs and outputs, those with the smallest mean magnitude. A threshold is the norm of a block; of inputs and
    outputs, the mean magnitude of its entries (Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710).
    See `MagnitudePruner` for the arguments.
    """

    power = 1

    def of_weights(self, weight: Tensor, blocks: Sequence[int]) -> Tensor:
        return l1_norm(weight, blocks)
