"""The Pareto front of metric against MACs."""

from __future__ import annotations

from raycomp.results.summary import TrialFigures
from raycomp.tune.front import with_front


def front(points: list[tuple[float | None, int | None]], mode: str = "max") -> list[int]:
    trials = [TrialFigures(str(index), {}, metric, macs) for index, (metric, macs) in enumerate(points)]
    return [int(trial.trial) for trial in with_front(trials, mode) if trial.on_front]


def test_only_what_nobody_beats_is_on_the_front() -> None:
    assert front([(0.9, 100), (0.8, 50), (0.85, 100), (0.7, 60), (0.95, 300)]) == [0, 1, 4]


def test_as_good_in_one_and_worse_in_the_other_is_beaten() -> None:
    assert front([(0.9, 100), (0.9, 120), (0.8, 100)]) == [0]


def test_equals_share_the_front() -> None:
    assert front([(0.9, 100), (0.9, 100)]) == [0, 1]


def test_less_of_a_loss_is_better() -> None:
    assert front([(0.2, 100), (0.4, 50), (0.5, 50)], "min") == [0, 1]


def test_failed_trials_neither_join_nor_keep_anybody_off() -> None:
    assert front([(None, None), (0.5, 10), (0.9, None), (None, 1)]) == [1]


def test_old_stars_are_taken_away() -> None:
    trials = [TrialFigures("0", {}, 0.5, 10, on_front=True), TrialFigures("1", {}, 0.6, 10)]
    assert [trial.on_front for trial in with_front(trials, "max")] == [False, True]
