"""Numbers and texts as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta

_METRIC_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def count(value: float | None) -> str:
    """12345 -> "12.3 k"; None -> a dash."""
    return "–" if value is None else _scaled(value, _METRIC_PREFIXES, "")


def size(num_bytes: float | None) -> str:
    """Bytes in powers of 1000: 123456 -> "123 kB"."""
    return "–" if num_bytes is None else _scaled(num_bytes, _BYTE_UNITS, "B")


def seconds(value: float | None) -> str:
    """A short time: 0.00123 -> "1.23 ms"; from two minutes on as h:mm:ss."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return number(value)
    if value >= 120:
        return str(timedelta(seconds=round(value)))
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{_three_digits(value / factor)} {unit}"
    return f"{_three_digits(value * 1e6)} µs" if value else "0 s"


def workers(number: int) -> str:
    """1 -> "1 worker", 2 -> "2 workers"."""
    return f"{number} worker" + ("s" if number != 1 else "")


def number(value: float | None) -> str:
    """A metric or a loss, in four significant digits."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("-", "−")


def percent(fraction: float | None) -> str:
    """0.4567 -> "45.7 %"."""
    return "–" if fraction is None else f"{_three_digits(fraction * 100)} %"


def difference(value: float) -> str:
    """A signed difference of metrics: -0.0056 -> "−0.0056"."""
    return "±0" if value == 0 else f"{value:+.2g}".replace("-", "−")


def times(dense: float | None, other: float | None) -> str:
    """How many times smaller or faster than dense: (100, 25) -> "4.00×"; empty where they are equal or unknown."""
    if not dense or not other or dense == other:
        return ""
    return f"{_three_digits(dense / other)}×"


def channels(type_name: str, shape: tuple[int, ...]) -> int:
    """Output channels of a weight: dimension 0, or 1 for transposed convolutions, which keep inputs first."""
    return shape[1 if "Transpose" in type_name else 0] if shape else 0


def layers_by_cause(causes: Mapping[str, str]) -> list[str]:
    """Layers that share a cause in one text: `conv1, conv2: its output has no scale`."""
    layers: dict[str, list[str]] = {}
    for layer, cause in causes.items():
        layers.setdefault(cause, []).append(layer)
    return [f"{', '.join(names)}: {cause}" for cause, names in layers.items()]


def _scaled(value: float, units: tuple[tuple[float, str], ...], base: str) -> str:
    if not math.isfinite(value):
        return number(value)
    for factor, unit in units:
        if abs(value) >= factor:
            return f"{_three_digits(value / factor)} {unit}"
    return f"{value:.0f} {base}".rstrip()


def _three_digits(value: float) -> str:
    if not math.isfinite(value):
        return number(value)
    magnitude = abs(value)
    digits = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2
    return f"{value:.{digits}f}"
