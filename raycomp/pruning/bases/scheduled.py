"""Pruning little by little: the base of the schedules around a basic pruner."""

from __future__ import annotations

from abc import abstractmethod

from raycomp.core.evaluator import Evaluator
from raycomp.errors import CompressionError, ConfigError, Problem
from raycomp.pruning.bases.around import AroundPruner
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.schedule import Every, Once, Schedule


class ScheduledPruner(AroundPruner):
    """Drives a basic pruner through a schedule: what is fused sees its masks grow.

    Args:
        pruner: the basic pruner that ranks and masks.
        schedule: when it decides, and how much.
        evaluator: how to train, where the pruner has no evaluator yet.

    Raises:
        ConfigError: as `AroundPruner`.
        CompressionError: `pruner` has a schedule.
    """

    @abstractmethod
    def __init__(self, pruner: Pruner, schedule: Schedule, evaluator: Evaluator | None = None) -> None:
        if not isinstance(pruner.schedule, Once):
            message = f"this {type(pruner).__name__} has a schedule already"
            raise CompressionError(message, remedy="put one schedule around a pruner")
        super().__init__(pruner, evaluator)
        pruner.schedule = schedule


class StepwisePruner(ScheduledPruner):
    """A schedule that decides every so many steps.

    Args:
        pruner: the basic pruner that ranks and masks.
        interval_steps: optimizer steps between two decisions; at least the pruner's `training_steps`.
        total_times: the number of decisions; the last one reaches the goal.
        evaluator: how to train, where the pruner has no evaluator yet.

    Raises:
        ConfigError: a decision would rest on more steps than lie before it; or as in `ScheduledPruner`.
    """

    @staticmethod
    @abstractmethod
    def curve(progress: float, goal: float) -> float:
        """The fraction of the goal that is due."""

    def __init__(
        self, pruner: Pruner, interval_steps: int, total_times: int, evaluator: Evaluator | None = None
    ) -> None:
        if pruner.window > interval_steps:
            message = f"interval_steps {interval_steps} is below the pruner's training_steps {pruner.window}"
            raise ConfigError([Problem("interval_steps", message, f"at least {pruner.window}")])
        super().__init__(pruner, Every(interval_steps, total_times, self.curve), evaluator)
