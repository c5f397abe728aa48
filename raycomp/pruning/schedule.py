"""When a pruner decides, and how much of its goal is due each time. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """One decision of a pruner.

    Args:
        step: after how many optimizer steps (0: before training).
        fraction: the part of the goal that is due, above 0 and at most 1.
    """

    step: int
    fraction: float


Schedule = tuple[Decision, ...]


def once(step: int) -> Schedule:
    """The whole goal at one step."""
    return (Decision(step, 1.0),)


def linear(interval_steps: int, total_times: int) -> Schedule:
    """The goal × t/T at every `interval_steps`, T = `total_times` times."""
    return _every(interval_steps, total_times, lambda progress: progress)


def agp(interval_steps: int, total_times: int) -> Schedule:
    """The goal × (1 − (1 − t/T)³): quick at first, slow at the end (Zhu and Gupta, arXiv:1710.01878)."""
    return _every(interval_steps, total_times, lambda progress: 1 - (1 - progress) ** 3)


def _every(interval_steps: int, total_times: int, fraction: Callable[[float], float]) -> Schedule:
    times = range(1, total_times + 1)
    return tuple(Decision(time * interval_steps, fraction(time / total_times)) for time in times)
