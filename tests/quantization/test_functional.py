"""The arithmetic of quantization against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycomp.core.integers import IntegerRange
from raycomp.quantization.functional import fake_quantize, moving_average, scale_and_zero_point


def tensors(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@pytest.mark.parametrize(
    ("low", "high", "dtype", "scheme", "scale", "zero_point"),
    [
        (-1, 3, "int8", "symmetric", 3 / 127, 0),
        (-1, 3, "int8", "affine", 4 / 254, -63),
        (-1, 3, "uint8", "symmetric", 3 / 127.5, 128),
        (-1, 3, "uint4", "affine", 4 / 15, 4),
        (-3, 5, "int8", "affine", 8 / 254, -32),
        (-3, 5, "int8", "symmetric", 5 / 127, 0),
        # The range is widened to contain 0.
        (1, 3, "uint8", "affine", 3 / 255, 0),
        (-3, -1, "uint8", "affine", 3 / 255, 255),
        (0, 0, "int8", "symmetric", torch.finfo(torch.float32).eps, 0),
    ],
)
def test_scales_and_zero_points(
    low: float, high: float, dtype: str, scheme: str, scale: float, zero_point: int
) -> None:
    found = scale_and_zero_point(*tensors(low, high), dtype, scheme)
    assert float(found[0]) == pytest.approx(scale, rel=1e-12)
    assert int(found[1]) == zero_point
    assert found[1].dtype == torch.int32


@pytest.mark.parametrize(
    ("dtype", "limits"), [("int8", (-127, 127)), ("uint8", (0, 255)), ("int4", (-7, 7)), ("uint2", (0, 3))]
)
def test_integer_ranges(dtype: str, limits: tuple[int, int]) -> None:
    assert IntegerRange.of(dtype) == IntegerRange(*limits)


def formula(value: Tensor, scale: Tensor, zero_point: Tensor, limits: IntegerRange) -> Tensor:
    levels = (value.double() / scale.double() + zero_point).clamp(limits.quant_min, limits.quant_max).round()
    return (levels - zero_point) * scale.double()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "int16", "uint16"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_formula(
    dtype: str, scheme: str, axis: int | None, precision: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(6, 5, 4, generator=generator).to(precision).requires_grad_()
    others = [dim for dim in range(3) if dim != axis]
    # The range is narrower than the values, so that some are clamped.
    low, high = (0.6 * end(value.detach(), dim=others, keepdim=axis is not None) for end in (torch.amin, torch.amax))
    scale, zero_point = scale_and_zero_point(low, high, dtype, scheme)
    limits = IntegerRange.of(dtype)
    found = fake_quantize(value, scale, zero_point, limits, axis)
    expected = formula(value.detach(), scale, zero_point, limits)
    assert found.dtype == precision
    assert torch.allclose(found.detach().double(), expected, rtol=0, atol=1e-5 if precision == torch.float32 else 1e-12)
    found.sum().backward()
    levels = (value.detach().double() / scale.double() + zero_point).round()
    inside = (levels >= limits.quant_min) & (levels <= limits.quant_max)
    assert 0.3 < inside.double().mean() < 1
    assert torch.equal(value.grad, inside.to(precision))


def test_half_precision_is_quantized_in_float32() -> None:
    value = torch.tensor([0.3, -1.7, 9.0], dtype=torch.bfloat16)
    found = fake_quantize(value, torch.tensor(0.05), torch.tensor(0, dtype=torch.int32), IntegerRange(-127, 127), None)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), torch.tensor([0.3, -1.7, 6.35]), rtol=0.005)


def test_zero_stays_zero() -> None:
    scale, zero_point = scale_and_zero_point(*tensors(-0.37, 2.9), "uint8", "affine")
    assert float(fake_quantize(torch.zeros(1), scale.float(), zero_point, IntegerRange(0, 255), None)) == 0


def test_a_moving_average_begins_with_what_it_first_sees() -> None:
    (infinite, one, two) = tensors(float("inf"), 1.0, 2.0)
    assert float(moving_average(infinite, one)) == 1
    assert float(moving_average(one, two)) == pytest.approx(1.01, rel=1e-12)
