"""Calibrations as values: what is said of a target's range, judged in one place, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from raycomp.config import canonical_target, nearest
from raycomp.config.values import shown
from raycomp.core.integers import IntegerRange, bits_of
from raycomp.core.moments import Calibration
from raycomp.core.target import TargetId
from raycomp.errors import CompressionError

NUMBERS = ("scale", "zero_point", "tracked_min", "tracked_max")
_KEYS = (*NUMBERS, "quant_dtype", "quant_scheme", "quant_bits", "quant_min", "quant_max", "axis")
_FORM = "{module: {target: {scale, zero_point, …}}}, as get_calibration_config() gives it"
_DTYPES = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 17)}
_STORABLE = IntegerRange(-32768, 65535)


def canonical_calibration(
    calibration: Any, needs: Sequence[str] = (), settings: Mapping[TargetId, Mapping[str, Any]] | None = None
) -> Calibration:
    """A calibration with numbers as tensors, and every target by its full name (`_input_` is short for `_input_0`).

    Args:
        calibration: {module: {target: {scale, zero_point, …}}}, its numbers as tensors, lists or numbers.
        needs: the keys that each target must have.
        settings: what the config list says of the targets: the calibration may repeat it, not say otherwise.

    Raises:
        CompressionError: another form, an unknown key, or a value that no range has: scales are finite and above 0,
            zero points whole numbers of the data type, tracked ranges finite with `tracked_min` at most `tracked_max`.
    """
    result: Calibration = {}
    if not isinstance(calibration, Mapping):
        raise CompressionError(f"got {shown(calibration)}", where="calibration", remedy=_FORM)
    for module, targets in calibration.items():
        where = f"calibration[{module!r}]"
        if not isinstance(module, str):
            raise CompressionError(f"got {shown(module)} as a module", where=where, remedy="its name in the model")
        if not isinstance(targets, Mapping) or not all(isinstance(target, str) for target in targets):
            raise CompressionError(f"got {shown(targets)}", where=where, remedy=_FORM)
        found = result.setdefault(module, {})
        for target, values in targets.items():
            target_id = TargetId(module, canonical_target(target))
            if target_id.target in found:
                raise CompressionError("the calibration names it twice", where=str(target_id), remedy="once is enough")
            found[target_id.target] = _Entry(target_id, values).judged(needs, (settings or {}).get(target_id, {}))
    return result


class _Entry:
    """What a calibration says of one target."""

    def __init__(self, target_id: TargetId, values: Any) -> None:
        self._where = str(target_id)
        if not isinstance(values, Mapping):
            raise CompressionError(f"got {shown(values)}", where=self._where, remedy="{scale, zero_point, …}")
        self._values = dict(values)

    def judged(self, needs: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The values, with numbers as tensors."""
        for key in self._values:
            if key not in _KEYS:
                remedy = nearest(str(key), _KEYS)
                raise CompressionError(f"the calibration has no key {shown(key)}", where=self._where, remedy=remedy)
        if missing := [key for key in needs if key not in self._values]:
            lacks = f"the calibration lacks {', '.join(missing)}"
            raise CompressionError(lacks, where=self._where, remedy="as get_calibration_config() gives it")
        for key, expected in settings.items():
            if not _same(self._values.get(key, expected), expected):
                self._refuse(key, self._values[key], f"{shown(expected)}, as the config list says")
        limits = self._limits(settings)
        for key in NUMBERS:
            if key in self._values:
                self._values[key] = self._tensor(key)
        self._judge_numbers(limits)
        self._judge_shapes()
        return self._values

    def _limits(self, settings: Mapping[str, Any]) -> IntegerRange:
        """The integers that the target's values may become."""
        said = {**settings, **self._values}
        if "quant_scheme" in said and said["quant_scheme"] not in ("affine", "symmetric"):
            self._refuse("quant_scheme", said["quant_scheme"], "affine or symmetric")
        dtype = said.get("quant_dtype")
        if dtype is not None or "quant_dtype" in said:
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                self._refuse("quant_dtype", dtype, "int2 to int16, or uint2 to uint16")
            limits = IntegerRange.of(dtype)
            right = {"quant_bits": bits_of(dtype), "quant_min": limits.quant_min, "quant_max": limits.quant_max}
            for key, value in right.items():
                if key in said and not _same(said[key], value):
                    self._refuse(key, said[key], f"{value}, as {dtype} has")
            return limits
        ends = [said.get("quant_min", _STORABLE.quant_min), said.get("quant_max", _STORABLE.quant_max)]
        for key, value in zip(("quant_min", "quant_max"), ends, strict=True):
            if not isinstance(value, int) or not _STORABLE.quant_min <= value <= _STORABLE.quant_max:
                self._refuse(key, value, "a whole number that 2 to 16 bits hold")
        if ends[0] >= ends[1]:
            self._refuse("quant_min", ends[0], f"below quant_max, {ends[1]}")
        return IntegerRange(*ends)

    def _tensor(self, key: str) -> Tensor:
        value = self._values[key]
        try:
            tensor = torch.as_tensor(value).detach()
        except (TypeError, ValueError, RuntimeError, OverflowError):  # whatever isn't made of numbers
            self._refuse(key, value, "a number, or a tensor of numbers")
        unfit = tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.dtype == torch.bool
        if unfit or not tensor.numel():
            self._refuse(key, value, "a number, or a dense tensor of real numbers")
        return tensor if key == "zero_point" or tensor.is_floating_point() else tensor.float()

    def _judge_numbers(self, limits: IntegerRange) -> None:
        never = "a finite number above 0; was the target calibrated, or did training diverge?"
        self._all("scale", lambda scale: torch.isfinite(scale.float()) & (scale.float() > 0), never)
        whole = f"a whole number from {limits.quant_min} to {limits.quant_max}"
        self._all("zero_point", lambda zero: (zero == zero.round()) & _between(zero, limits), whole)
        if "zero_point" in self._values:
            self._values["zero_point"] = self._values["zero_point"].to(torch.int32)
        for key in ("tracked_min", "tracked_max"):
            self._all(key, lambda end: torch.isfinite(end.float()), "a finite number")

    def _all(self, key: str, right: Callable[[Tensor], Tensor], remedy: str) -> None:
        if key in self._values:
            wrong = self._values[key][~right(self._values[key])]
            if wrong.numel():
                self._refuse(key, wrong[0].item(), remedy)

    def _judge_shapes(self) -> None:
        tensors = {key: self._values[key] for key in NUMBERS if key in self._values}
        scale = tensors.get("scale")
        for key, tensor in tensors.items():
            if scale is not None and tensor.numel() > 1 and tensor.shape != scale.shape:
                message = f"the calibration's scale has the shape {tuple(scale.shape)}, {key} {tuple(tensor.shape)}"
                raise CompressionError(message, where=self._where, remedy="should be one shape, or single numbers")
        if {"tracked_min", "tracked_max"} <= tensors.keys():
            low, high = torch.broadcast_tensors(tensors["tracked_min"], tensors["tracked_max"])
            for over in (low > high).nonzero()[:1]:
                self._refuse("tracked_min", low[*over].item(), f"at most tracked_max, {high[*over].item()}")
        axis = self._values.get("axis")
        unfit = not isinstance(axis, int) or (scale is not None and not varies_along(scale, axis))
        if axis is not None and unfit:
            self._refuse("axis", axis, "the one dimension along which the scale varies, or null")

    def _refuse(self, key: str, value: object, remedy: str) -> NoReturn:
        given = f"the calibration's {key} is {shown(value)}"
        raise CompressionError(given, where=self._where, remedy=f"should be {remedy}")


def varies_along(scale: Tensor, axis: int) -> bool:
    """Whether there is such a dimension, and all others have the size 1."""
    inside = -scale.dim() <= axis < scale.dim()
    return inside and scale.numel() == scale.shape[axis]


def _between(value: Tensor, limits: IntegerRange) -> Tensor:
    return (value >= limits.quant_min) & (value <= limits.quant_max)


def _same(value: object, right: object) -> bool:
    return isinstance(value, type(right)) and value == right
