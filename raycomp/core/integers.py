"""The integers of quantized values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IntegerRange:
    """The integers that a quantized value may take: intN is ±(2^(N-1)-1), uintN is 0 to 2^N-1."""

    quant_min: int
    quant_max: int

    @classmethod
    def of(cls, dtype: str) -> IntegerRange:
        """The range of `int8`, `uint4`, …"""
        bits = bits_of(dtype)
        if dtype.startswith("u"):
            return cls(0, 2**bits - 1)
        return cls(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)


def bits_of(dtype: str) -> int:
    """8 for `int8` and `uint8`."""
    return int(dtype.removeprefix("u").removeprefix("int"))
