"""The Pareto front of metric against MACs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from raycomp.results.summary import TrialFigures


def with_front(trials: Sequence[TrialFigures], mode: Literal["max", "min"]) -> tuple[TrialFigures, ...]:
    """The trials with `on_front` set: no other is better in one of metric and MACs and as good in the other.

    Args:
        trials: those without a metric or MACs are not on the front, and keep nobody off it.
        mode: whether more or less of the metric is better.
    """
    sign = 1 if mode == "max" else -1
    points = {
        index: (sign * trial.metric, -trial.macs)
        for index, trial in enumerate(trials)
        if trial.metric is not None and trial.macs is not None
    }
    return tuple(
        replace(
            trial,
            on_front=index in points and not any(_beats(other, points[index]) for other in points.values()),
        )
        for index, trial in enumerate(trials)
    )


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]
