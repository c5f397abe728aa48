"""The arithmetic of quantization: ranges, scales, zero points, fake quantization. Pure tensor functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raycomp.core.integers import IntegerRange

_SMALLEST_SCALE = torch.finfo(torch.float32).eps


def scale_and_zero_point(low: Tensor, high: Tensor, dtype: str, scheme: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, which is widened to contain 0, so that 0 is represented exactly.

    symmetric: s = absmax / ((qmax - qmin) / 2), zp = (qmax + qmin + 1) // 2;
    affine: s = (max - min) / (qmax - qmin), zp = clamp(qmin - round(min / s)); s is at least float32's epsilon.

    Args:
        low, high: the range's ends, of any equal shape.
        dtype: `int8`, `uint8`, …
        scheme: `symmetric` or `affine`.

    Returns:
        The scale in the dtype of the range, and the zero point in int32, both of the range's shape.
    """
    limits = IntegerRange.of(dtype)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme == "symmetric":
        half = (limits.quant_max - limits.quant_min) / 2
        scale = (torch.maximum(-low, high) / half).clamp(min=_SMALLEST_SCALE)
        zero_point = torch.full_like(scale, (limits.quant_max + limits.quant_min + 1) // 2)
    else:
        scale = ((high - low) / (limits.quant_max - limits.quant_min)).clamp(min=_SMALLEST_SCALE)
        zero_point = (limits.quant_min - (low / scale).round()).clamp(limits.quant_min, limits.quant_max)
    return scale, zero_point.to(torch.int32)


def fake_quantize(value: Tensor, scale: Tensor, zero_point: Tensor, limits: IntegerRange, axis: int | None) -> Tensor:
    """`(round(clamp(x/s + zp, qmin, qmax)) - zp) * s`, with the straight-through gradient, 0 outside the range.

    Args:
        value: any floating-point tensor.
        scale, zero_point: 0-dim, or broadcastable to `value`.
        limits: the integers to clamp to.
        axis: the dimension of per-channel scales; None for one scale, or for scales that vary along several dimensions.
    """
    if value.dtype == torch.float64 or (axis is None and scale.numel() > 1):
        # torch's fused kernels compute 1/s in float32, whatever the dtype, and know one axis.
        return _FakeQuantize.apply(value, scale, zero_point.to(value.dtype), limits)  # type: ignore[no-untyped-call]
    narrow = value.dtype if value.dtype != torch.float32 else None
    value = value.float()
    if axis is None:
        result = torch.fake_quantize_per_tensor_affine(value, scale, zero_point, limits.quant_min, limits.quant_max)
    else:
        result = torch.fake_quantize_per_channel_affine(
            value, scale.flatten(), zero_point.flatten(), axis, limits.quant_min, limits.quant_max
        )
    return result if narrow is None else result.to(narrow)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, zero_point: Tensor, limits: IntegerRange) -> Tensor:
        # Rounded first, as torch's kernels do: an end of the range divided by its own scale may be an ulp outside.
        levels = (value / scale + zero_point).round_()
        ctx.save_for_backward((levels >= limits.quant_min) & (levels <= limits.quant_max))
        return (levels.clamp_(limits.quant_min, limits.quant_max) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def moving_average(tracked: Tensor, observed: Tensor, momentum: float = 0.99) -> Tensor:
    """`momentum × tracked + (1 - momentum) × observed`; the first observation (nothing finite tracked yet) as it is."""
    averaged = momentum * tracked + (1 - momentum) * observed
    return torch.where(torch.isfinite(tracked), averaged, observed)
