"""Linear schedule."""

from __future__ import annotations

from raycomp.pruning.bases.scheduled import StepwisePruner
from raycomp.pruning.schedule import linear


class LinearPruner(StepwisePruner):
    """The sparsity grows linearly: goal × t/T; see `StepwisePruner` for the arguments."""

    @staticmethod
    def curve(progress: float, goal: float) -> float:
        """The fraction of the goal that is due."""
        return linear(progress, goal)
