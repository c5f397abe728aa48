"""A target: one parameter, input or output of a module, and the chain of transforms that stand on it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from raycomp.errors import CompressionError

TargetKind = Literal["parameter", "input", "output"]
Slot = Literal["factors", "watchers", "masks", "recorders"]
SLOTS: tuple[Slot, ...] = ("factors", "watchers", "masks", "recorders")


class TargetId(NamedTuple):
    """Where a target is: the module's name in the model, and the target's name in the module."""

    module: str
    target: str

    def __str__(self) -> str:
        return f"{self.module}.{self.target}" if self.module else self.target


def target_kind(name: str) -> TargetKind:
    """The kind that a target's name tells: `_input_…`, `_output_…`, else a parameter."""
    if name.startswith("_input_"):
        return "input"
    if name.startswith("_output_"):
        return "output"
    return "parameter"


class AdoptsShapes(nn.Module):
    """A module whose buffers take the shape and the dtype that a loaded state dict brings.

    Statistics grow to their size, and take the precision of what they watch, in training.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if buffer is None or loaded is None:
                continue
            if (loaded.shape, loaded.dtype) != (buffer.shape, buffer.dtype):
                self._buffers[name] = torch.empty_like(loaded, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


def set_buffer_(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a buffer a new value, in place where the shape stays, so that DDP's references hold."""
    buffer = module.get_buffer(name)
    if buffer.shape == value.shape:
        buffer.copy_(value)
    else:
        module._buffers[name] = value.to(device=buffer.device, dtype=buffer.dtype)


class Target(nn.Module):
    """The transforms of one target, run in the order factor → watch → quantize → mask → record.

    A mask comes after the quantizer, so that what is masked and quantized lies on the quantizer's grid: 0 does. Masks
    of several compressors multiply; only one can quantize. The target is itself a module, so that buffers and learned
    tensors of its transforms move, copy and save with the model.

    Args:
        target_id: which target this is.
    """

    factors: nn.ModuleList | None
    watchers: nn.ModuleList | None
    quantizer: nn.Module | None
    masks: nn.ModuleList | None
    recorders: nn.ModuleList | None

    def __init__(self, target_id: TargetId) -> None:
        super().__init__()
        self.target_id = target_id
        self.quantized_by = ""
        self.defer_quantizer = False
        self.register_module("quantizer", None)
        for slot in SLOTS:
            # Made on first use: every module there is costs DDP time, which looks for buffers before each forward pass.
            self.register_module(slot, None)

    @property
    def kind(self) -> TargetKind:
        """Whether a parameter, an input or an output is meant."""
        return target_kind(self.target_id.target)

    def add(self, slot: Slot, transform: nn.Module) -> None:
        """Puts `transform` behind those that are in the slot."""
        if getattr(self, slot) is None:
            self.register_module(slot, nn.ModuleList())
        getattr(self, slot).append(transform)

    def set_quantizer(self, quantizer: nn.Module, owner: str) -> None:
        """Puts the quantizer on the target.

        Raises:
            CompressionError: another compressor quantizes it already.
        """
        if self.quantizer is not None:
            raise CompressionError(
                f"both {self.quantized_by} and {owner} quantize this target",
                where=str(self.target_id),
                remedy="exclude it from one of the two config lists",
            )
        self.quantized_by = owner
        self.add_module("quantizer", quantizer)

    def masked(self, value: Tensor) -> Tensor:
        """The value under all factors and masks, unquantized."""
        for factor in self.factors or ():
            value = factor(value)
        return self._under_masks(value)

    def forward(self, value: Any) -> Any:
        """The target's value as the compressed model sees it; what isn't a floating-point tensor passes through."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for factor in self.factors or ():
            value = factor(value)
        for watcher in self.watchers or ():
            watcher(value)
        if self.quantizer is not None and not self.defer_quantizer:
            value = self.quantizer(value)
        value = self._under_masks(value)
        for recorder in self.recorders or ():
            recorder(value)
        return value

    def _under_masks(self, value: Tensor) -> Tensor:
        try:
            for mask in self.masks or ():
                value = mask(value)
        except CompressionError as error:
            raise CompressionError(error.message, where=str(self.target_id), remedy=error.remedy) from None
        return value
