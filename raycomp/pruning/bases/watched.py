"""Pruners that rank by what passes through modules while the model trains: the base, and what it gathers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.model import device_of
from raycomp.core.moments import RunContext
from raycomp.core.reduction import Statistic
from raycomp.core.target import TargetId
from raycomp.core.watcher import Watcher
from raycomp.errors import CompressionError
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import block_sum


class BlockWatcher(Watcher):
    """Gathers a number for each block of a value, in the steps that count.

    Args:
        name: of the target.
        grid: blocks in each dimension.
    """

    def __init__(self, name: str, grid: Sequence[int]) -> None:
        super().__init__(name)
        self.grid = tuple(grid)
        self.gathers = False
        """Whether the step at hand counts."""

    def fresh(self, value: Tensor) -> dict[str, Statistic]:
        zeros = torch.zeros(self.grid, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device)
        return {"sum": Statistic(zeros, "sum", f"sum over {self.name}")}

    def forward(self, value: Tensor) -> None:
        if self.gathers:
            super().forward(value)

    @property
    def sum(self) -> Tensor:
        """What was gathered.

        Raises:
            CompressionError: nothing was.
        """
        if not self.gathered:
            message = "no training step passed a value through it"
            raise CompressionError(message, where=self.name, remedy="leave it out of the config list")
        return self.gathered["sum"].tensor

    def blocks_of(self, value: Tensor) -> list[int]:
        """The size of a block in each dimension of a value; one alone takes whatever there is.

        Raises:
            CompressionError: the value doesn't split into the grid's blocks.
        """
        counts = list(zip(value.shape, self.grid, strict=False))
        if value.dim() != len(self.grid) or any(size % count for size, count in counts):
            message = f"a value of shape {tuple(value.shape)} doesn't split into {self.grid} blocks"
            raise CompressionError(message, where=self.name, remedy="give it one block per channel")
        return [size // count for size, count in counts]


class BlockMeans(BlockWatcher):
    """The mean of a function of a value's entries over each of its blocks and all samples; padding doesn't count.

    Args:
        name, grid: as `BlockWatcher`.
        function: of the entries, elementwise.
        channel_dim: where the grid is [1, channels], whatever the value's other dimensions are: that of the channels.
    """

    def __init__(
        self, name: str, grid: Sequence[int], function: Callable[[Tensor], Tensor], channel_dim: int | None = None
    ) -> None:
        super().__init__(name, grid)
        self.function = function
        self.channel_dim = channel_dim

    def fresh(self, value: Tensor) -> dict[str, Statistic]:
        count = torch.zeros((), dtype=torch.float64, device=value.device)
        return {**super().fresh(value), "count": Statistic(count, "sum", f"entries of {self.name}")}

    def update(self, value: Tensor) -> None:
        found = self.function(value.to(self.sum.dtype))
        if self.channel_dim is not None:
            # Summed where they lie: moving the channels would copy the whole value.
            channels = self.channel_dim % value.dim()
            found = found.sum([dim for dim in range(value.dim()) if dim != channels]).unsqueeze(0)
        self.sum.add_(block_sum(found, self.blocks_of(found)))
        self.gathered["count"].tensor.add_(value.numel() // self.sum.numel())

    def mean(self) -> Tensor:
        """Over everything that was seen, once the ranks' sums are merged; errors as of `sum`."""
        return self.sum / self.gathered["count"].tensor.to(self.sum.dtype)


class WatchingPruner(Pruner):
    """A pruner that ranks by what it watches during the last `training_steps` optimizer steps before a decision.

    Args:
        model, config_list, evaluator: see `Pruner`.
        training_steps: how many steps are watched before a decision; 0 for a decision before training.
    """

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 0,
    ) -> None:
        self.training_steps = training_steps
        self.watchers: dict[TargetId, BlockWatcher] = {}
        super().__init__(model, config_list, evaluator)

    @property
    def window(self) -> int:
        return self.training_steps

    def watcher(self, target_id: TargetId) -> tuple[TargetId, BlockWatcher] | None:
        """What is watched to rank a target: where, and by what; None where nothing has to be."""
        return None

    def attach(self) -> None:
        for target_id in self.goals:
            found = self.watcher(target_id)
            if found is not None:
                watcher = self.watchers.setdefault(target_id, found[1].to(device_of(self.model)))
                self.chain.space.target(found[0]).add("watchers", watcher)
        super().attach()

    def begin_run(self, context: RunContext) -> None:
        self._watch(self.chain.step + 1)

    def before_step(self, step: int) -> None:
        self._watch(step + 1)

    def end_run(self) -> None:
        for watcher in self.watchers.values():
            watcher.gathers = False

    def statistics(self) -> list[Statistic]:
        return [statistic for watcher in self.watchers.values() for statistic in watcher.statistics()]

    def running_statistics(self) -> list[Statistic]:
        return self.statistics()

    @abstractmethod
    def of_watched(self, target_id: TargetId, watcher: BlockWatcher) -> Tensor:
        """The saliency of a target that was watched, merged over the workers."""

    def of_unwatched(self, target_id: TargetId) -> Tensor:
        """The saliency of a target that needs no watching."""
        raise NotImplementedError

    def saliencies(self) -> dict[TargetId, Tensor]:
        """Of what was watched and of what needs no watching; what is watched from now on begins anew."""
        found = {
            key: self.of_watched(key, self.watchers[key]) if key in self.watchers else self.of_unwatched(key)
            for key in self.goals
        }
        self.rewind()
        return found

    def rewind(self) -> None:
        for watcher in self.watchers.values():
            watcher.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"watched": {str(key): watcher.gathered_state() for key, watcher in self.watchers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, watcher in self.watchers.items():
            watcher.load_gathered(state["watched"][str(key)], device_of(self.model))

    def _watch(self, step: int) -> None:
        gathers = self.schedule.gathers(step, self.window)
        for watcher in self.watchers.values():
            watcher.gathers = gathers
