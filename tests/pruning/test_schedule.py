"""How much of the goal is due, and when."""

from __future__ import annotations

import pytest

from raycomp.core.moments import Moment
from raycomp.pruning.schedule import Every, Once, RoundEnds, Schedule, agp, linear, same_part_each_time


def decisions(schedule: Schedule, steps: int) -> list[tuple[int, float]]:
    """(step, progress) of every decision that falls at the beginning or after a step."""
    moments = [Moment("begin", 0), *(Moment("step", step) for step in range(1, steps + 1))]
    progress = [(moment.step, schedule.progress(moment)) for moment in moments]
    return [(step, value) for step, value in progress if value is not None]


def parts(schedule: Schedule, goal: float) -> list[float]:
    return [goal * schedule.due(progress, goal) for _, progress in decisions(schedule, 50)]


def test_the_goals_of_agp_and_linear_for_three_quarters_in_four_times() -> None:
    assert parts(Every(10, 4, linear), 0.75) == pytest.approx([0.1875, 0.375, 0.5625, 0.75])
    # 0.75 (1 - (1 - t/4)³): 0.75 × 37/64, 0.75 × 56/64, 0.75 × 63/64, 0.75
    assert parts(Every(10, 4, agp), 0.75) == pytest.approx([0.75 * part / 64 for part in (37, 56, 63, 64)])


def test_decisions_fall_after_every_interval() -> None:
    assert [step for step, _ in decisions(Every(10, 3, agp), 50)] == [10, 20, 30]
    assert decisions(Once(7), 50) == [(7, 1.0)]
    assert decisions(Once(0), 50) == [(0, 1.0)]
    assert Once(0).progress(Moment("round", 0)) is None


def test_rounds_prune_the_same_part_of_what_is_left_each_time() -> None:
    schedule = RoundEnds(3, same_part_each_time, True)
    progress = [schedule.progress(Moment("round", 10 * index, index)) for index in range(4)]
    assert progress == [1 / 3, 2 / 3, 1.0, None]
    # 7/8 in three times leaves a half, a quarter, an eighth.
    due = [0.875 * schedule.due(value, 0.875) for value in progress if value is not None]
    assert due == pytest.approx([1 / 2, 3 / 4, 7 / 8])
    assert schedule.due(1 / 3, 0.0) == 1 / 3
    assert (schedule.rounds, schedule.rewinds, schedule.last_step) == (4, True, 0)
    assert decisions(schedule, 50) == []


def test_the_steps_that_count_lie_within_the_window_before_a_decision() -> None:
    assert [step for step in range(1, 12) if Once(7).gathers(step, 3)] == [5, 6, 7]
    assert [step for step in range(1, 12) if Every(4, 2, linear).gathers(step, 2)] == [3, 4, 7, 8]
    assert all(RoundEnds(1, linear, True).gathers(step, 2) for step in range(1, 12))


def test_a_schedule_is_over_after_its_last_decision() -> None:
    assert [step for step in range(5) if not Once(3).is_over(step, 0)] == [0, 1, 2]
    assert [step for step in range(9) if not Every(3, 2, agp).is_over(step, 0)] == [0, 1, 2, 3, 4, 5]
    assert Once(0).is_over(0, 0)
    assert [index for index in range(5) if not RoundEnds(3, linear, False).is_over(99, index)] == [0, 1, 2]
