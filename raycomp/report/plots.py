"""Small charts as SVG text: pure functions of their numbers, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from raycomp.report import text

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 20, 26
_MAX_POINTS = 240

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A named vertical line, such as the step at which a stage begins."""

    x: float
    label: str


@dataclass(frozen=True)
class Dot:
    """One point of a scatter plot; `title` is what the pointer shows."""

    x: float
    y: float
    title: str
    on_front: bool = False


@dataclass(frozen=True)
class _Frame:
    """Maps data to the drawing's coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - _TOP - _BOTTOM)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(points: Sequence[Point], *, label: str, x_label: str, marks: Sequence[Mark] = ()) -> str:
    """A curve; points that are not finite leave a gap in it. `label` is read out to those who don't see it."""
    finite = [point for point in points if _is_finite(point)]
    if not finite:
        return ""
    frame = _frame(finite, whole_x=[mark.x for mark in marks])
    lines = [
        f'<polyline class="curve" points="{_path(frame, segment)}"/>' if len(segment) > 1 else _dot(frame, segment[0])
        for segment in _segments(_thinned(points))
    ]
    last = finite[-1]
    end = (
        f'<circle class="end" cx="{frame.x(last[0]):.1f}" cy="{frame.y(last[1]):.1f}" r="3">'
        f"<title>{text.number(last[1])}</title></circle>"
    )
    return _svg(label, _axes(frame, x_label) + _mark_lines(frame, marks) + "".join(lines) + end)


def scatter(dots: Sequence[Dot], *, label: str, x_label: str) -> str:
    """Points, with those on the Pareto front set off and joined."""
    finite = [dot for dot in dots if _is_finite((dot.x, dot.y))]
    if not finite:
        return ""
    frame = _frame([(dot.x, dot.y) for dot in finite])
    front = sorted((dot.x, dot.y) for dot in finite if dot.on_front)
    line = f'<polyline class="front" points="{_path(frame, front)}"/>' if len(front) > 1 else ""
    circles = "".join(
        f'<circle class="{"on-front" if dot.on_front else "dominated"}" cx="{frame.x(dot.x):.1f}" '
        f'cy="{frame.y(dot.y):.1f}" r="4.5"><title>{escape(dot.title)}</title></circle>'
        for dot in finite
    )
    return _svg(label, _axes(frame, x_label) + line + circles)


def bar(kept: float, label: str) -> str:
    """A stretching bar: what is kept, in [0, 1], filled before the outline of all there was."""
    width = 100 * min(max(kept, 0.0), 1.0)
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<rect class="all" width="100" height="10"/><rect class="kept" width="{width:.2f}" height="10"/></svg>'
    )


def _frame(points: Sequence[Point], whole_x: Sequence[float] = ()) -> _Frame:
    xs = [x for x, _ in points] + list(whole_x)
    ys = [y for _, y in points]
    return _Frame(*_room(min(xs), max(xs), 0.02), *_room(min(ys), max(ys), 0.06))


def _room(low: float, high: float, share: float) -> tuple[float, float]:
    span = (high - low) or abs(high) or 1.0
    lower = low - share * span
    # An axis that starts at zero shows the truth better than one that starts just below it.
    return (0.0 if low >= 0 > lower else lower), high + share * span


def _axes(frame: _Frame, x_label: str) -> str:
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick_text(value)}</text>')
    bottom = HEIGHT - _BOTTOM
    for value in ticks(frame.x_low, frame.x_high):
        parts.append(
            f'<text x="{frame.x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{_tick_text(value)}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 1}" text-anchor="end" class="unit">{escape(x_label)}</text>')
    return "".join(parts)


def _tick_text(value: float) -> str:
    return text.count(value) if abs(value) >= 10_000 else text.number(value)


def _mark_lines(frame: _Frame, marks: Sequence[Mark]) -> str:
    parts = []
    for mark in marks:
        x = f"{frame.x(mark.x):.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="mark" x="{x}" y="{_TOP - 6}">{escape(mark.label)}</text>')
    return "".join(parts)


def _path(frame: _Frame, points: Sequence[Point]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _dot(frame: _Frame, point: Point) -> str:
    return f'<circle class="end" cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}" r="2"/>'


def _segments(points: Sequence[Point]) -> list[list[Point]]:
    segments: list[list[Point]] = [[]]
    for point in points:
        if _is_finite(point):
            segments[-1].append(point)
        elif segments[-1]:
            segments.append([])
    return [segment for segment in segments if segment]


def _thinned(points: Sequence[Point]) -> list[Point]:
    stride = max(1, math.ceil(len(points) / _MAX_POINTS))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _svg(label: str, body: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'
