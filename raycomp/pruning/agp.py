"""Automated gradual pruning."""

from __future__ import annotations

from raycomp.pruning.bases.scheduled import StepwisePruner
from raycomp.pruning.schedule import agp


class AGPPruner(StepwisePruner):
    """The sparsity grows as goal × (1 − (1 − t/T)³)
    (Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878); see `StepwisePruner` for the arguments."""

    @staticmethod
    def curve(progress: float, goal: float) -> float:
        """The fraction of the goal that is due."""
        return agp(progress, goal)
