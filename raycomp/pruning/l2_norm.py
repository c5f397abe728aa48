"""L2 norm pruning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raycomp.pruning.bases.magnitude import MagnitudePruner
from raycomp.pruning.saliency import l2_norm


class L2NormPruner(MagnitudePruner):
    """Prunes the blocks (by default the output channels) with the smallest L2 norm of their weights.

    Of inputs and outputs, those with the smallest root mean square. A threshold is the norm of a block; of inputs and
    outputs, the root mean square of its entries. See `MagnitudePruner` for the arguments.
    """

    power = 2

    def of_weights(self, weight: Tensor, blocks: Sequence[int]) -> Tensor:
        return l2_norm(weight, blocks)

    def of_means(self, means: Tensor) -> Tensor:
        return means.sqrt()
