"""Automated gradual pruning."""

from __future__ import annotations

from raycomp.pruning.schedule import Schedule, agp
from raycomp.pruning.scheduled import ScheduledPruner


class AGPPruner(ScheduledPruner):
    """The sparsity grows as goal × (1 − (1 − t/T)³)
    (Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878); see `ScheduledPruner` for the arguments."""

    @staticmethod
    def schedule(interval_steps: int, total_times: int) -> Schedule:
        """The decisions."""
        return agp(interval_steps, total_times)
