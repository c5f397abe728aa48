"""Operators that mix positions and leave every channel by itself: pooling, resizing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.rules.base import RULES, Rule


class Positions(Rule):
    """Mixes the last dimensions.

    Args:
        num_dims: how many dimensions.
    """

    def __init__(self, num_dims: int) -> None:
        self._num_dims = num_dims

    def relate(self, call: Call, atoms: Atoms) -> None:
        value = call.inputs[0]
        channels = value.ndim - self._num_dims
        for output in call.outputs:
            for dim in range(channels):
                atoms.same(value, dim, output, dim)
        for each in (*call.inputs, *call.outputs):
            for dim in range(channels, each.ndim):
                atoms.fix_dim(each, dim, f"{call.label} works on positions")

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        value = call.inputs[0]
        dims = list(range(value.ndim - self._num_dims, value.ndim))
        mixed = given[value].mean(dim=dims, keepdim=True)
        return [mixed.expand(output.shape) + torch.zeros(()) for output in call.outputs]


_POOLS = ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "max_pool{}d_with_indices")
_RESIZES = {
    1: ("upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d"),
    2: (
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "_upsample_nearest_exact2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    ),
    3: ("upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact3d"),
}

for _dims, _resizes in _RESIZES.items():
    RULES.register(Positions(_dims), *(f"aten.{name.format(_dims)}" for name in (*_POOLS, *_resizes)))
