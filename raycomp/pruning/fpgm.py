"""Filter pruning via the geometric median."""

from __future__ import annotations

from torch import Tensor

from raycomp.core.selection import Selected
from raycomp.core.target import TargetId
from raycomp.errors import Problem
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import block_vectors, distances

_MOST_BLOCKS = 1 << 17


class FPGMPruner(Pruner):
    """Prunes the filters (or other blocks of weights) that lie nearest to all others: these can stand for them.

    The saliency of a filter is the sum of its Euclidean distances to all filters of its layer; a threshold is such a
    sum. It decides before the first training step (He et al., Filter Pruning via Geometric Median for
    Deep Convolutional Neural Networks Acceleration, arXiv:1811.00250).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: only for what is fused with it.
    """

    def saliencies(self) -> dict[TargetId, Tensor]:
        """Each filter's distances to the others, summed."""
        found = {}
        for target_id in self.goals:
            vectors = block_vectors(self.chain.space.parameter(target_id), self.blocks(target_id))
            found[target_id] = distances(vectors).view(self.grid(target_id))
        return found

    def _goal_problems(self, target_id: TargetId, selected: Selected) -> list[Problem]:
        problems = super()._goal_problems(target_id, selected)
        if not problems and (count := self.count(target_id)) > _MOST_BLOCKS:
            message = f"{target_id} has {count} blocks, and each is held against all others"
            problems.append(Problem(f"{selected.where}.granularity", message, "prune channels"))
        return problems
