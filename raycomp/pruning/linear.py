"""Linear schedule."""

from __future__ import annotations

from raycomp.pruning.schedule import Schedule, linear
from raycomp.pruning.scheduled import ScheduledPruner


class LinearPruner(ScheduledPruner):
    """The sparsity grows linearly: goal × t/T; see `ScheduledPruner` for the arguments."""

    @staticmethod
    def schedule(interval_steps: int, total_times: int) -> Schedule:
        """The decisions."""
        return linear(interval_steps, total_times)
