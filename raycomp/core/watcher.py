"""What is gathered of a target's values while the model trains or calibrates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.batch_share import counted_positions, is_idle
from raycomp.core.reduction import Statistic, restored_statistics, statistics_state
from raycomp.core.watching import Watched, is_watched


class Watcher(nn.Module, ABC):
    """Statistics of the values of one target, on this rank; each says how it merges over the ranks.

    Their shape and dtype follow from the value's, so that a rank without samples has them too, with nothing counted in.
    Padding doesn't count.
    They are no buffers, because DDP would overwrite those of all ranks with rank 0's at each forward pass.

    Args:
        name: of the target.
        during: whose forward passes count, those of training steps or of a calibration.
    """

    def __init__(self, name: str, during: Watched = "training") -> None:
        super().__init__()
        self.name = name
        self.during = during
        self.gathered: dict[str, Statistic] = {}

    @abstractmethod
    def fresh(self, value: Tensor) -> dict[str, Statistic]:
        """Statistics of values like `value` before any was seen."""

    @abstractmethod
    def update(self, value: Tensor) -> None:
        """Counts a batch in."""

    def forward(self, value: Tensor) -> None:
        """Takes a batch into account; not the stand-in of an idle rank."""
        if not is_watched(self.during):
            return
        with torch.no_grad():
            if not self.gathered:
                self.gathered = self.fresh(value.detach())
            counted = _counted(value.detach())
            if counted.numel() and not is_idle():
                self.update(counted)

    def statistics(self) -> list[Statistic]:
        """What was gathered, to be merged in place; nothing before the first forward pass."""
        return list(self.gathered.values())

    def reset(self) -> None:
        """Forgets what was seen."""
        self.gathered = {}

    def gathered_state(self) -> dict[str, Any]:
        """What was gathered, for a checkpoint; the ranks' were merged before."""
        return statistics_state(self.gathered)

    def load_gathered(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from `gathered_state()`."""
        self.gathered = restored_statistics(state, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.gathered = {
            name: Statistic(fn(item.tensor), item.operation, item.name) for name, item in self.gathered.items()
        }
        return self


def _counted(value: Tensor) -> Tensor:
    """The value without padded positions, as those of one sample."""
    positions = counted_positions(value)
    return value if positions is None else value[positions].unsqueeze(0)
