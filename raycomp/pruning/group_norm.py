"""Group norm pruning."""

from __future__ import annotations

from torch import Tensor

from raycomp.core.target import TargetId
from raycomp.pruning.bases.coupled import CoupledPruner
from raycomp.pruning.saliency import block_sum


class GroupNormPruner(CoupledPruner):
    """Prunes the channels with the smallest L2 norm of all weights that go with them, in all layers together.

    A threshold is such a norm. It decides before the first training step (Fang et al., DepGraph: Towards Any Structural
    Pruning, CVPR 2023, arXiv:2301.12900).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: gives the example input that the model is traced with (`dummy_input`).
    """

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The norm of each channel's weights."""
        sums = self.summed(lambda parameter: parameter.detach().square())
        found = {}
        for target_id in self.goals:
            own = self.of_channels(target_id, sums)
            if own is None:
                own = block_sum(self.chain.space.parameter(target_id).detach().square(), self.blocks(target_id))
            found[target_id] = own.sqrt()
        return found
