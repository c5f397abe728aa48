"""What is constant and what is needed, element by element of every value.

Forward: an element is *tainted* while it depends on the model's input (in values that no input reaches: while it
depends on a parameter that no mask has zeroed). What isn't tainted is a constant, and the run on the example input
shows which. Backward: an element is *needed* while some output depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycomp.speedup.graph.graph import Value


@dataclass(frozen=True)
class Constants:
    """Which coordinates of a dimension hold one constant throughout.

    Args:
        is_known: for each coordinate, whether all its elements are constants.
        is_constant: whether they are one and the same constant.
        values: the constant, or the mean of the constants; 0 where they aren't known.
    """

    is_known: NDArray[np.bool_]
    is_constant: NDArray[np.bool_]
    values: NDArray[np.float64]

    @property
    def is_zero(self) -> NDArray[np.bool_]:
        zero: NDArray[np.bool_] = self.is_constant & (self.values == 0)
        return zero


@dataclass(frozen=True)
class Flow:
    """The state of both analyses.

    Args:
        tensors: every value, as the example input makes it.
        static: values that no input reaches.
        taint: see above.
        needed: see above; static values count as needed throughout.
    """

    tensors: Mapping[Value, Tensor]
    static: set[Value] = field(default_factory=set)
    taint: dict[Value, Tensor] = field(default_factory=dict)
    needed: dict[Value, Tensor] = field(default_factory=dict)

    def known(self, value: Value) -> Tensor:
        """Elements that are constant whatever the input is."""
        return torch.ones_like(self.taint[value]) if value in self.static else ~self.taint[value]

    def zero(self, value: Value) -> Tensor:
        """Elements that are zero whatever the input is, and not just by a parameter's accidental value."""
        return ~self.taint[value] & (self.tensors[value] == 0)

    def live(self, value: Value) -> Tensor:
        """1.0 for every element that isn't `zero`, else 0.0."""
        return (~self.zero(value)).float()

    def needed_along(self, value: Value, dim: int) -> NDArray[np.bool_]:
        """Coordinates of a dimension with an element that is needed."""
        return _along(self.needed[value], dim).any(dim=1).cpu().numpy()

    def constants(self, value: Value, dim: int) -> Constants:
        """The coordinates of a dimension that hold one constant throughout."""
        tensor = _along(self.tensors[value], dim).double()
        known = _along(self.known(value), dim).all(dim=1)
        low, high = tensor.amin(dim=1), tensor.amax(dim=1)
        largest = torch.maximum(low.abs(), high.abs())
        rounding = 64 * torch.finfo(self._float_type(value)).eps * largest
        known = known & torch.isfinite(largest)
        uniform = known & (high - low <= rounding)
        constants = torch.where(known, tensor.mean(dim=1), torch.zeros_like(low))
        constants = torch.where(uniform, (low + high) / 2, constants)
        return Constants(known.cpu().numpy(), uniform.cpu().numpy(), constants.cpu().numpy())

    def _float_type(self, value: Value) -> torch.dtype:
        dtype = self.tensors[value].dtype
        return dtype if dtype.is_floating_point else torch.float64


def _along(tensor: Tensor, dim: int) -> Tensor:
    """The tensor as [coordinates of the dimension, everything else]."""
    moved = tensor.movedim(dim, 0)
    return moved.reshape(moved.shape[0], -1)
