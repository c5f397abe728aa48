"""The grid of a quantized target: which numbers it can hold, and the 8- or 16-bit integers that store them.

Every grid comes from a calibration (the scales and zero points that training learned); none is measured here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycomp.errors import SpeedupError


@dataclass(frozen=True)
class Grid:
    """The numbers `(q - zero_point) * scale` for the integers q in `quant_min..quant_max`.

    Args:
        scale: one float32 value for the whole tensor, or one per index along `axis`.
        zero_point: as many integers.
        axis: the dimension of a per-channel grid; None where one scale serves the whole tensor.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    quant_min: int
    quant_max: int
    axis: int | None

    def to_text(self) -> str:
        """The grid as one text, which `from_text` gives back: torch writes lists of numbers out anew each time it
        changes a graph, thousands for every layer."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_text(text: str) -> Grid:
        """What `to_text` wrote."""
        fields = json.loads(text)
        return Grid(**{**fields, "scale": tuple(fields["scale"]), "zero_point": tuple(fields["zero_point"])})

    def parameters(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point as tensors that broadcast against `like`."""
        shape = [1] * like.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        scale = torch.tensor(self.scale, dtype=like.dtype, device=like.device).view(shape)
        zero_point = torch.tensor(self.zero_point, dtype=like.dtype, device=like.device).view(shape)
        return scale, zero_point

    def quantize(self, x: Tensor) -> Tensor:
        """The grid's integers nearest to `x`, as floats."""
        scale, zero_point = self.parameters(x)
        return torch.round(torch.clamp(x / scale + zero_point, self.quant_min, self.quant_max))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`(round(clamp(x/s + zp, qmin, qmax)) - zp) * s`, in the dtype of `x`."""
        scale, zero_point = self.parameters(x)
        return (self.quantize(x) - zero_point) * scale

    def shifted(self, shift: int) -> Grid:
        """The same numbers under other integers: every q becomes q + shift."""
        return dataclasses.replace(
            self,
            zero_point=tuple(z + shift for z in self.zero_point),
            quant_min=self.quant_min + shift,
            quant_max=self.quant_max + shift,
        )

    def halved(self) -> Grid:
        """A grid of half as many numbers over the same range: twice the scale (7-bit weights from 8-bit ones)."""
        return Grid(
            scale=tuple(2 * s for s in self.scale),
            zero_point=tuple(round(z / 2) for z in self.zero_point),
            quant_min=self.quant_min // 2,
            quant_max=-(-self.quant_max // 2),
            axis=self.axis,
        )

    @property
    def bits(self) -> int:
        """The width of the integers: 8 for -127..127 and for 0..255."""
        return (self.quant_max - self.quant_min).bit_length()


def stored_activation(grid: Grid) -> tuple[Grid, str]:
    """The grid as unsigned integers, with their dtype.

    ONNX Runtime's integer kernels are quickest with unsigned activations and signed weights on x86, and want the same
    type for inputs and outputs; a shift by 128 changes no number that the grid can hold. Per-channel grids get 16 bits,
    because those kernels mistake them for per-tensor ones; 16 bits they leave alone.
    """
    wide = grid.bits > 8 or grid.axis is not None
    shift = (32768 if wide else 128) if grid.quant_min < 0 else 0
    return grid.shifted(shift), "uint16" if wide else "uint8"


def stored_weight(grid: Grid, kernel_axis: int | None) -> tuple[Grid, str]:
    """The grid as signed integers, with their dtype.

    Args:
        grid: of the weight.
        kernel_axis: the dimension along which the layer's integer kernel takes scales, None where it has no such
            kernel. Scales along another dimension get 16 bits, because the kernel would mistake them for its own.
    """
    misread = None not in (grid.axis, kernel_axis) and grid.axis != kernel_axis
    wide = grid.bits > 8 or misread
    highest = 32767 if wide else 127
    shift = -(highest + 1) if grid.quant_max > highest else 0
    return grid.shifted(shift), "int16" if wide else "int8"


def grid_of(entry: Mapping[str, Any], where: str) -> Grid:
    """The grid of one entry of a calibration that was judged by `canonical_calibration`.

    Raises:
        SpeedupError: scales that vary along more than one dimension.
    """
    scale, zero_point = _numbers(entry)
    return Grid(
        scale=tuple(scale.flatten().tolist()),
        zero_point=tuple(int(z) for z in zero_point.flatten().tolist()),
        quant_min=int(entry["quant_min"]),
        quant_max=int(entry["quant_max"]),
        axis=_axis(entry, scale, where),
    )


def in_blocks(entry: Mapping[str, Any]) -> bool:
    """Whether scales vary along several dimensions, which no integer kernel and no ONNX operator computes with."""
    return sum(size > 1 for size in entry["scale"].shape) > 1


def on_blocks_grid(value: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """A parameter whose scales vary along several dimensions, on its grid, as floats."""
    scale, zero_point = (each.to(value) for each in _numbers(entry))
    integers = torch.round(value / scale + zero_point).clamp(int(entry["quant_min"]), int(entry["quant_max"]))
    return (integers - zero_point) * scale


def _numbers(entry: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    scale = entry["scale"].detach().cpu().to(torch.float32)
    return scale, entry["zero_point"].detach().cpu().to(torch.float64).expand(scale.shape)


def _axis(entry: Mapping[str, Any], scale: Tensor, where: str) -> int | None:
    if scale.numel() == 1:
        return None
    declared = entry.get("axis")
    wide = [dim for dim, size in enumerate(scale.shape) if size > 1]
    if len(wide) > 1:
        raise SpeedupError(
            f"a scale of shape {tuple(scale.shape)} varies along several dimensions",
            where=where,
            remedy="per tensor and per channel can be lowered; blocks cannot",
        )
    return int(declared) if declared is not None else wide[0]
