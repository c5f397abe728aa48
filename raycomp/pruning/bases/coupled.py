"""Pruners that judge a channel by all weights that go with it: the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

from raycomp.core.coupling import Coupling
from raycomp.core.selection import Selected
from raycomp.core.target import TargetId
from raycomp.errors import Problem
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import block_sum


class CoupledPruner(Pruner):
    """Sums what it gathers over all weights that go with a channel: of its own layer, of norms behind it, and of the
    inputs of what takes it. The model's graph tells which these are; a layer whose channels can't go has its own alone.
    """

    coupled = True

    @property
    def coupling(self) -> Coupling:
        """What goes with each channel."""
        assert self.selection.coupling is not None
        return self.selection.coupling

    def summed(self, of_parameter: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
        """The sum over all weights that go with each channel: [channels].

        Args:
            of_parameter: what is summed of a parameter, in its shape; None where there is nothing.
        """
        dtype = max((each.dtype for each in self._floating()), key=lambda each: each.itemsize)
        along: list[Tensor] = []
        for name, parts in groupby(self.coupling.parts, lambda part: part.parameter):
            parameter = self._parameter(name)
            values = of_parameter(parameter)
            for part in parts:
                along.append(parameter.new_zeros(len(part.channel_of)) if values is None else part.along(values))
        return self.coupling.summed(along, torch.promote_types(dtype, torch.float32))

    def of_channels(self, target_id: TargetId, sums: Tensor) -> Tensor | None:
        """The sums of a target's blocks; None where its channels can't go."""
        layout = self.layouts[target_id]
        channels = self.coupling.channels_of(str(target_id), layout.channel_dim or 0)
        if channels is None:
            return None
        run = len(channels) // self.count(target_id)
        return block_sum(sums[torch.tensor(channels, device=sums.device)], [run]).view(self.grid(target_id))

    def _floating(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.is_floating_point())

    def _parameter(self, full_name: str) -> nn.Parameter:
        module, _, name = full_name.rpartition(".")
        return self.chain.space.parameter(TargetId(module, name))

    def _goal_problems(self, target_id: TargetId, selected: Selected) -> list[Problem]:
        problems = super()._goal_problems(target_id, selected)
        layout = self.layouts[target_id]
        if not problems and layout.is_parameter and not self.is_of_channels(target_id):
            message = f"{target_id} is judged by whole output channels"
            problems.append(Problem(f"{selected.where}.granularity", message, "out_channel"))
        return problems
