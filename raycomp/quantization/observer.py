"""What a quantizer watches of an activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycomp.core.reduction import Statistic
from raycomp.core.share import is_idle
from raycomp.core.target import AdoptsShapes, set_buffer_


class RangeTracker(AdoptsShapes):
    """The least and the greatest value since the last reset, on this rank; min and max merge them over the ranks.

    Watches in training mode alone, and not the stand-in batch of a rank without samples.

    Args:
        keep: the dimension whose entries have a range each (None: one range for the tensor).
    """

    low: Tensor
    high: Tensor

    def __init__(self, keep: int | None = None) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("low", torch.tensor(torch.inf), persistent=False)
        self.register_buffer("high", torch.tensor(-torch.inf), persistent=False)

    @torch.no_grad()
    def forward(self, value: Tensor) -> None:
        """Takes one batch into account."""
        if not self.training:
            return
        low, high = value_range(value, self.keep)
        if is_idle():
            low, high = torch.full_like(low, torch.inf), torch.full_like(high, -torch.inf)
        set_buffer_(self, "low", torch.minimum(self.low.to(low), low))
        set_buffer_(self, "high", torch.maximum(self.high.to(high), high))

    def statistics(self) -> list[Statistic]:
        """The two ends, to be merged in place."""
        return [Statistic(self.low, "min"), Statistic(self.high, "max")]

    def reset(self) -> None:
        """Forgets what was seen."""
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)


def value_range(value: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """The least and greatest entry, over everything or for each entry of dimension `keep` (shape [1, …, n, …, 1])."""
    value = value.detach()
    if keep is None:
        low, high = torch.aminmax(value)
        return low, high
    others: Sequence[int] = [dim for dim in range(value.dim()) if dim != keep]
    if not others:
        return value, value
    return value.amin(dim=others, keepdim=True), value.amax(dim=others, keepdim=True)
