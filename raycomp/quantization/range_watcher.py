"""What a quantizer watches of an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomp.core.reduction import Statistic
from raycomp.core.watcher import Watcher
from raycomp.core.watching import Watched


class RangeWatcher(Watcher):
    """The least and the greatest value since the last reset; min and max merge them over the ranks.

    Args:
        name: of the target.
        keep: the dimension whose entries have a range each (None: one range for the tensor).
        during: whose forward passes count.
    """

    def __init__(self, name: str, keep: int | None = None, during: Watched = "training") -> None:
        super().__init__(name, during)
        self.keep = keep

    def fresh(self, value: Tensor) -> dict[str, Statistic]:
        shape = [] if self.keep is None else _kept_shape(value, self.keep)
        like = {"dtype": torch.promote_types(value.dtype, torch.float32), "device": value.device}
        return {
            "low": Statistic(torch.full(shape, torch.inf, **like), "min", f"range of {self.name}"),  # type: ignore[call-overload]
            "high": Statistic(torch.full(shape, -torch.inf, **like), "max", f"range of {self.name}"),  # type: ignore[call-overload]
        }

    def update(self, value: Tensor) -> None:
        low, high = value_range(value.to(self.low.dtype), self.keep)
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)

    @property
    def low(self) -> Tensor:
        """The least values."""
        return self.gathered["low"].tensor

    @property
    def high(self) -> Tensor:
        """The greatest values."""
        return self.gathered["high"].tensor

    @property
    def has_seen(self) -> bool:
        """Whether any rank has seen a value, once the statistics are merged."""
        return bool(self.gathered) and bool(torch.isfinite(self.low).all())


def _kept_shape(value: Tensor, keep: int) -> list[int]:
    return [size if dim == keep % value.dim() else 1 for dim, size in enumerate(value.shape)]


def group_range(value: Tensor, keep: int, groups: int) -> tuple[Tensor, Tensor]:
    """The least and greatest entry of each output channel of a grouped transposed convolution's weight.

    Args:
        value: the weight.
        keep: the dimension of the channels within a group.
        groups: equal parts of dimension 0.

    Returns:
        Two tensors of the shape [value.shape[0], 1, …, value.shape[keep], …, 1].
    """
    parts = value.detach().unflatten(0, (groups, -1))
    others = [dim for dim in range(1, parts.dim()) if dim != keep + 1]
    ends = parts.amin(dim=others, keepdim=True), parts.amax(dim=others, keepdim=True)
    low, high = (end.expand(-1, parts.shape[1], *end.shape[2:]).flatten(0, 1) for end in ends)
    return low, high


def value_range(value: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """The least and greatest entry, over everything or for each entry of dimension `keep` (shape [1, …, n, …, 1])."""
    value = value.detach()
    if keep is None:
        low, high = torch.aminmax(value)
        return low, high
    others = [dim for dim in range(value.dim()) if dim != keep % value.dim()]
    if not others:
        return value, value
    return value.amin(dim=others, keepdim=True), value.amax(dim=others, keepdim=True)
