"""The module that stands on a quantized target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raycomp.config import QuantizeTarget
from raycomp.core.integers import IntegerRange, bits_of
from raycomp.core.target import AdoptsShapes, set_buffer_
from raycomp.quantization.functional import fake_quantize, scale_and_zero_point


class FakeQuantize(AdoptsShapes):
    """Rounds its target to the integers that it will be stored in, and back; the identity until `active`.

    All that it knows is in buffers, so that what copies a model's state (a state dict, a moving average of a model)
    copies what it computes.

    Args:
        settings: dtype and scheme.
        axis: the dimension whose entries have a scale each (-1: the last one); None for one scale, or for scales that
            vary along several dimensions.
        shape: of the scale, broadcastable to the target; it grows where it isn't known.
    """

    scale: Tensor
    zero_point: Tensor
    tracked_min: Tensor
    tracked_max: Tensor
    enabled: Tensor

    def __init__(self, settings: QuantizeTarget, axis: int | None, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.settings = settings
        self.axis = axis
        self.limits = IntegerRange.of(settings.quant_dtype)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("tracked_min", torch.full(shape, torch.inf))
        self.register_buffer("tracked_max", torch.full(shape, -torch.inf))
        # A number, because torch's means of buffers can't be made of truth values; above 0 is on.
        self.register_buffer("enabled", torch.zeros(()))
        self._read: tuple[Tensor | None, int, bool] = (None, -1, False)

    @property
    def active(self) -> bool:
        """Whether it rounds."""
        tensor, version, active = self._read
        if torch.compiler.is_compiling():
            return active
        if self.enabled.is_inference():
            return bool(self.enabled)
        if tensor is not self.enabled or version != self.enabled._version:
            # Reading it waits for the device, so it is read again only where somebody wrote it.
            active = bool(self.enabled)
            self._read = (self.enabled, self.enabled._version, active)
        return active

    @active.setter
    def active(self, value: bool) -> None:
        self.enabled.fill_(value)
        self._read = (self.enabled, self.enabled._version, value)

    def forward(self, value: Tensor) -> Tensor:
        """The quantized and dequantized value."""
        if not self.active or self.settings.apply_method == "bypass":
            return value
        axis = None if self.axis is None else self.axis % value.dim()
        return fake_quantize(value, self.scale.to(_precise(value)), self.zero_point, self.limits, axis)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Takes over a range: scale and zero point follow from it."""
        scale, zero_point = scale_and_zero_point(low, high, self.settings.quant_dtype, self.settings.quant_scheme)
        for name, value in (("tracked_min", low), ("tracked_max", high), ("scale", scale), ("zero_point", zero_point)):
            self._buffers[name] = self._buffers[name].to(value.dtype)  # type: ignore[union-attr]
            set_buffer_(self, name, value)

    def reset(self) -> None:
        """Forgets the range: the identity again."""
        for name, value in (("tracked_min", torch.inf), ("tracked_max", -torch.inf)):
            self._buffers[name] = torch.full_like(self.get_buffer(name), value)
        self.active = False

    def said(self) -> dict[str, Any]:
        """What the config list says of the target, as a calibration config repeats it."""
        return {
            "quant_dtype": self.settings.quant_dtype,
            "quant_scheme": self.settings.quant_scheme,
            "quant_bits": bits_of(self.settings.quant_dtype),
            "quant_min": self.limits.quant_min,
            "quant_max": self.limits.quant_max,
        }

    def calibration(self) -> dict[str, Any]:
        """The target's part of a calibration config."""
        return {
            "scale": self.scale.detach().clone(),
            "zero_point": self.zero_point.detach().clone(),
            **self.said(),
            "axis": None if self.axis is None else self.axis % self.scale.dim(),
            "tracked_min": self.tracked_min.detach().clone(),
            "tracked_max": self.tracked_max.detach().clone(),
        }


def _precise(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32
