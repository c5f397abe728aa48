"""When a pruner decides, and how much of its goal is due each time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from raycomp.core.moments import Moment

Curve = Callable[[float, float], float]
"""From the progress t/T (above 0, at most 1) and the goal to the fraction of the goal that is due."""


class Schedule(ABC):
    """A pruner's decisions as a function of the moment."""

    @abstractmethod
    def progress(self, moment: Moment) -> float | None:
        """How far this moment's decision goes, above 0 and at most 1; None where nothing is decided."""

    @abstractmethod
    def gathers(self, step: int, window: int) -> bool:
        """Whether optimizer step `step` (counted from 1) is one of the last `window` before a decision."""

    def due(self, progress: float, goal: float) -> float:
        """The fraction of a goal (a sparse ratio, or 0 for a threshold) that is due."""
        return progress

    def is_over(self, step: int, round: int) -> bool:
        """Whether the last decision has fallen, once `step` optimizer steps are done and `round` is under way."""
        return step >= self.last_step

    @property
    def last_step(self) -> int:
        """The optimizer step after which the last decision falls; 0 where it falls elsewhere."""
        return 0

    @property
    def rounds(self) -> int:
        """Training runs that it needs."""
        return int(self.last_step > 0)

    @property
    def rewinds(self) -> bool:
        """Whether each round begins with the first one's weights."""
        return False


@dataclass(frozen=True)
class Once(Schedule):
    """The whole goal after one step; 0: before training."""

    step: int

    @property
    def last_step(self) -> int:
        return self.step

    def progress(self, moment: Moment) -> float | None:
        event = "step" if self.step else "begin"
        return 1.0 if (moment.event, moment.step) == (event, self.step) else None

    def gathers(self, step: int, window: int) -> bool:
        return self.step - window < step <= self.step


@dataclass(frozen=True)
class Every(Schedule):
    """A part of the goal every `interval_steps`, `total_times` times."""

    interval_steps: int
    total_times: int
    curve: Curve

    @property
    def last_step(self) -> int:
        return self.interval_steps * self.total_times

    def progress(self, moment: Moment) -> float | None:
        times, rest = divmod(moment.step, self.interval_steps)
        if moment.event != "step" or rest or not 0 < times <= self.total_times:
            return None
        return times / self.total_times

    def due(self, progress: float, goal: float) -> float:
        return self.curve(progress, goal)

    def gathers(self, step: int, window: int) -> bool:
        decision = -(-step // self.interval_steps) * self.interval_steps
        return decision <= self.last_step and decision - window < step


@dataclass(frozen=True)
class Between(Schedule):
    """A part of the goal after every step behind `first_step`, and all of it at `final_step`."""

    first_step: int
    final_step: int
    curve: Curve

    @property
    def last_step(self) -> int:
        return self.final_step

    def progress(self, moment: Moment) -> float | None:
        if moment.event != "step" or not self.first_step < moment.step <= self.final_step:
            return None
        return (moment.step - self.first_step) / (self.final_step - self.first_step)

    def due(self, progress: float, goal: float) -> float:
        return self.curve(progress, goal)

    def gathers(self, step: int, window: int) -> bool:
        return step <= self.final_step


@dataclass(frozen=True)
class RoundEnds(Schedule):
    """A part of the goal at the end of each of `total_rounds` rounds of training; one more trains what is left."""

    total_rounds: int
    curve: Curve
    from_first_weights: bool
    first_round: int = 0

    @property
    def rounds(self) -> int:
        return self.first_round + self.total_rounds + 1

    @property
    def rewinds(self) -> bool:
        return self.from_first_weights

    def progress(self, moment: Moment) -> float | None:
        done = moment.round + 1 - self.first_round
        return done / self.total_rounds if moment.event == "round" and 0 < done <= self.total_rounds else None

    def due(self, progress: float, goal: float) -> float:
        return self.curve(progress, goal)

    def is_over(self, step: int, round: int) -> bool:
        return round >= self.first_round + self.total_rounds

    def gathers(self, step: int, window: int) -> bool:
        # When a round ends isn't known beforehand, so all of it counts.
        return True


def linear(progress: float, goal: float) -> float:
    """The fraction t/T of the goal."""
    return progress


def agp(progress: float, goal: float) -> float:
    """The fraction 1 − (1 − t/T)³ of the goal: quick at first, slow at the end (Zhu and Gupta, arXiv:1710.01878)."""
    return 1 - (1 - progress) ** 3


def same_part_each_time(progress: float, goal: float) -> float:
    """The fraction of the goal that is the sparsity 1 − (1 − goal)^(t/T): each time the same part of what is left
    (Frankle and Carbin, arXiv:1803.03635)."""
    return progress if progress == 1 or goal == 0 else (1 - (1 - goal) ** progress) / goal


def at_once(progress: float, goal: float) -> float:
    """The whole goal each time."""
    return 1.0
