"""Layer-adaptive magnitude pruning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raycomp.config import PruneTarget
from raycomp.core.target import TargetId
from raycomp.pruning.bases.magnitude import MagnitudePruner
from raycomp.pruning.saliency import block_sum, layer_adaptive


class LAMPPruner(MagnitudePruner):
    """Ranks weights (or blocks) over all layers by their squared magnitude as a part of what their layer would have
    left: each layer gets the sparsity that it bears, and at least one block of it stays.

    Targets with a `sparse_ratio` and no group of their own are ranked together with all others of that ratio. A
    threshold is a part from 0 to 1 (Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning,
    arXiv:2010.07611). See `MagnitudePruner` for the arguments.
    """

    default_granularity = (1,)
    searchable = False
    power = 2

    def of_weights(self, weight: Tensor, blocks: Sequence[int]) -> Tensor:
        return layer_adaptive(block_sum(weight.square(), blocks))

    def of_means(self, means: Tensor) -> Tensor:
        return layer_adaptive(means)

    def _settings(self, target_id: TargetId) -> PruneTarget:
        settings = super()._settings(target_id)
        if settings.sparse_ratio is None or settings.global_group_id is not None:
            return settings
        return settings.model_copy(update={"global_group_id": f"LAMP of ratio {settings.sparse_ratio}"})
