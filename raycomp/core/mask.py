"""The module that masks a target."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomp.core.masks import ApplyMethod, apply_mask, fits
from raycomp.core.target import AdoptsShapes, set_buffer_
from raycomp.errors import CompressionError

_KEPT = 0.999
"""A mean of masks keeps what nearly all of them keep: sums of floats are not exact."""


class Mask(AdoptsShapes):
    """Applies a mask to its target: `mul` zeroes, `add` adds -1000 where masked (for the inputs of a softmax).

    Args:
        shape: the target's shape; () for an activation, whose mask has none before the first decision.
        method: mul, add or bypass.
        has_rank: whether the mask broadcasts to the target as it is, as [channels] does where these are last; else it
            is the [1, channels] of an activation, with the channels in dimension 1. A forward pass shows the rank.
    """

    mask: Tensor

    def __init__(self, shape: tuple[int, ...], method: ApplyMethod = "mul", *, has_rank: bool = False) -> None:
        super().__init__()
        self.method: ApplyMethod = method
        self.has_rank = has_rank
        self.register_buffer("mask", torch.ones(shape))
        self._seen: int | None = None

    @classmethod
    def of(cls, mask: Tensor, method: ApplyMethod) -> Mask:
        """A module that applies a mask whose shape is whole."""
        made = cls(tuple(mask.shape), method, has_rank=True)
        made.mask = mask.clone()
        return made

    def forward(self, value: Tensor) -> Tensor:
        """The masked value.

        Raises:
            CompressionError: the mask doesn't broadcast to it.
        """
        self._make_whole_()
        mask = self._in_rank(self.mask, value.dim())
        if not fits(mask, value.shape):
            message = f"the mask's shape is {tuple(self.mask.shape)}, and the value's {tuple(value.shape)}"
            raise CompressionError(message, remedy="give it a mask that broadcasts to the value, one for all samples")
        if mask is not self.mask:
            self.mask = mask
        return apply_mask(value, mask, self.method)

    def set_(self, mask: Tensor) -> None:
        """Takes over a mask; that of an activation keeps the rank that a forward pass has shown."""
        set_buffer_(self, "mask", self._in_rank(mask, self.mask.dim()))

    def _make_whole_(self) -> None:
        """Sets the mask to 0 and 1 again, where others have written to it: AveragedModel makes means of buffers."""
        mask = self.mask
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or mask.is_inference():
            return
        if mask._version != self._seen:
            with torch.no_grad():
                mask.copy_(mask > _KEPT)
            self._seen = mask._version

    @torch.no_grad()
    def commit_(self, parameter: Tensor) -> None:
        """Zeroes the masked elements of a parameter for good."""
        if self.method == "mul":
            parameter.mul_(self.mask.to(parameter))

    def _in_rank(self, mask: Tensor, rank: int) -> Tensor:
        if not 0 < mask.dim() < rank:
            return mask
        ones = [1] * (rank - mask.dim())
        # [1, channels] of an activation whose rank wasn't known: behind the channels all is kept or masked alike.
        return mask.reshape(*ones, *mask.shape) if self.has_rank else mask.reshape(*mask.shape, *ones)
