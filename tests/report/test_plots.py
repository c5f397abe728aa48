from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from raycomp.report.plots import HEIGHT, WIDTH, Dot, Mark, bar, line_chart, scatter, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 100, [0, 50, 100]),
        (0.97, 0.99, [0.97, 0.975, 0.98, 0.985, 0.99]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def _points(svg: str) -> list[list[tuple[float, float]]]:
    curves = re.findall(r'<polyline class="curve" points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in curve.split()] for curve in curves]  # type: ignore[misc]


def test_a_curve_is_drawn_to_scale() -> None:
    ((left, middle, right),) = _points(line_chart([(0, 0), (5, 1), (10, 4)], label="loss", x_label="step"))
    assert left[0] < middle[0] < right[0]
    assert middle[0] - left[0] == pytest.approx(right[0] - middle[0], abs=0.11)
    # SVG's y goes down: the rise from 1 to 4 is three times that from 0 to 1.
    assert (middle[1] - right[1]) == pytest.approx(3 * (left[1] - middle[1]), abs=0.5)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in (left, middle, right))


def test_values_that_are_not_finite_leave_a_gap() -> None:
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0), (5, 2.0)]
    assert [len(curve) for curve in _points(line_chart(points, label="loss", x_label="step"))] == [2, 2]


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart([], label="loss", x_label="step") == ""
    assert line_chart([(0, math.nan)], label="loss", x_label="step") == ""
    assert scatter([], label="front", x_label="MACs") == ""


def test_one_point_and_a_constant_are_drawn() -> None:
    assert "<circle" in line_chart([(1, 0.5)], label="accuracy", x_label="step")
    assert len(_points(line_chart([(1, 0.5), (2, 0.5)], label="accuracy", x_label="step"))) == 1


def test_a_long_history_is_thinned_and_keeps_its_end() -> None:
    many = [(float(step), float(step)) for step in range(10_001)]
    ((*_, last),) = _points(line_chart(many, label="loss", x_label="step"))
    few = _points(line_chart([(0.0, 0.0), (10_000.0, 10_000.0)], label="loss", x_label="step"))[0][-1]
    assert last == few
    assert sum(map(len, _points(line_chart(many, label="loss", x_label="step")))) < 400


def test_charts_are_xml_whatever_the_names_are() -> None:
    marks = (Mark(0, "a<b"), Mark(3, 'c&"d'))
    chart = line_chart([(0, 1), (3, 2)], label='loss <&">', x_label="step<", marks=marks)
    dots = scatter([Dot(1, 2, "<t1>", True), Dot(2, 3, "t2")], label="a<b", x_label="MACs")
    for drawing in (chart, dots, bar(0.5, "8 <of> 16")):
        ElementTree.fromstring(drawing)
    assert "a&lt;b" in chart


def test_the_front_is_joined_in_the_order_of_x() -> None:
    dots = [Dot(3, 0.99, "c", True), Dot(1, 0.97, "a", True), Dot(2, 0.5, "b"), Dot(2.5, 0.98, "d", True)]
    svg = scatter(dots, label="front", x_label="MACs")
    found = re.search(r'class="front" points="([^"]*)"', svg)
    assert found is not None
    xs = [float(pair.split(",")[0]) for pair in found[1].split()]
    assert len(xs) == 3 and xs == sorted(xs)
    assert svg.count('class="on-front"') == 3 and svg.count('class="dominated"') == 1


@pytest.mark.parametrize(("kept", "width"), [(0.25, "25.00"), (1.5, "100.00"), (-1.0, "0.00")])
def test_a_bar_is_as_long_as_its_share(kept: float, width: str) -> None:
    assert f'class="kept" width="{width}"' in bar(kept, "channels")
