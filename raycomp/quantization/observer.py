"""What a quantizer watches of an activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raycomp.core.batch_share import is_idle
from raycomp.core.reduction import Statistic


class RangeTracker(nn.Module):
    """The least and the greatest value since the last reset, on this rank; min and max merge them over the ranks.

    Watches in training mode alone, and not the stand-in batch of a rank without samples. What it has seen is no buffer,
    because DDP would overwrite the buffers of all ranks with those of rank 0 at each forward pass.

    Args:
        keep: the dimension whose entries have a range each (None: one range for the tensor).
    """

    def __init__(self, keep: int | None = None) -> None:
        super().__init__()
        self.keep = keep
        self.low = torch.tensor(torch.inf)
        self.high = torch.tensor(-torch.inf)

    @torch.no_grad()
    def forward(self, value: Tensor) -> None:
        """Takes one batch into account."""
        if not self.training:
            return
        low, high = value_range(value.to(torch.promote_types(value.dtype, torch.float32)), self.keep)
        if is_idle():
            low, high = torch.full_like(low, torch.inf), torch.full_like(high, -torch.inf)
        self.low = torch.minimum(self.low.to(low), low)
        self.high = torch.maximum(self.high.to(high), high)

    def statistics(self) -> list[Statistic]:
        """The two ends, to be merged in place."""
        return [Statistic(self.low, "min"), Statistic(self.high, "max")]

    def reset(self) -> None:
        """Forgets what was seen."""
        self.low = torch.full_like(self.low, torch.inf)
        self.high = torch.full_like(self.high, -torch.inf)


def value_range(value: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """The least and greatest entry, over everything or for each entry of dimension `keep` (shape [1, …, n, …, 1])."""
    value = value.detach()
    if keep is None:
        low, high = torch.aminmax(value)
        return low, high
    others = [dim for dim in range(value.dim()) if dim != keep]
    if not others:
        return value, value
    return value.amin(dim=others, keepdim=True), value.amax(dim=others, keepdim=True)
