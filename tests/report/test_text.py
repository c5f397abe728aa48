from __future__ import annotations

import math

import pytest

from raycomp.report import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (4_000_000, "4.00 M"),
        (1.5e12, "1.50 T"),
        (None, "–"),
    ],
)
def test_count(value: float | None, shown: str) -> None:
    assert text.count(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0, "0 B"), (999, "999 B"), (123_456, "123 kB"), (2.5e9, "2.50 GB")])
def test_size(value: float, shown: str) -> None:
    assert text.size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0 s"),
        (0.00000123, "1.23 µs"),
        (0.00123, "1.23 ms"),
        (61.04, "61.0 s"),
        (119.9, "120 s"),
        (3_725, "1:02:05"),
        (math.nan, "nan"),
        (None, "–"),
    ],
)
def test_seconds(value: float | None, shown: str) -> None:
    assert text.seconds(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.98765, "0.9877"), (-1.5, "−1.5"), (math.inf, "∞"), (-math.inf, "−∞")])
def test_number(value: float, shown: str) -> None:
    assert text.number(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.0, "±0"), (-0.0056, "−0.0056"), (0.012, "+0.012")])
def test_difference(value: float, shown: str) -> None:
    assert text.difference(value) == shown


@pytest.mark.parametrize(
    ("dense", "other", "shown"),
    [(100, 25, "4.00×"), (100, 200, "0.50×"), (100, 100, ""), (None, 1, ""), (100, 0, ""), (1000, 80, "12.5×")],
)
def test_times(dense: float | None, other: float, shown: str) -> None:
    assert text.times(dense, other) == shown


def test_output_channels_of_a_transposed_convolution_stand_second() -> None:
    assert text.channels("Conv2d", (8, 3, 3, 3)) == 8
    assert text.channels("ConvTranspose2d", (8, 3, 2, 2)) == 3
    assert text.channels("ReLU", ()) == 0
