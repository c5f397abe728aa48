"""How much of the goal is due, and when."""

from __future__ import annotations

import pytest

from raycomp.pruning.schedule import agp, linear, once


def test_the_goals_of_agp_and_linear_for_three_quarters_in_four_times() -> None:
    assert [0.75 * decision.fraction for decision in linear(10, 4)] == pytest.approx([0.1875, 0.375, 0.5625, 0.75])
    # 0.75 (1 - (1 - t/4)³): 0.75 × 37/64, 0.75 × 56/64, 0.75 × 63/64, 0.75
    expected = [0.75 * part / 64 for part in (37, 56, 63, 64)]
    assert [0.75 * decision.fraction for decision in agp(10, 4)] == pytest.approx(expected)


def test_decisions_fall_after_every_interval() -> None:
    assert [decision.step for decision in agp(10, 3)] == [10, 20, 30]
    assert [(decision.step, decision.fraction) for decision in once(7)] == [(7, 1.0)]
