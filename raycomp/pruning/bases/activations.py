"""Pruners that rank channels by a module's output: the base, and the activations that outputs pass through."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.selection import Selected
from raycomp.core.target import TargetId
from raycomp.errors import Problem
from raycomp.pruning.bases.watched import BlockMeans, BlockWatcher, WatchingPruner

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "none": torch.Tensor.detach,
}
"""What an output may be passed through before it is judged."""


def judged(value: Tensor, activation: Activation, judge: Activation) -> Tensor:
    """What is averaged of an output."""
    return judge(activation(value))


class ActivationPruner(WatchingPruner):
    """Ranks a module's output channels by its output behind an activation, over the last `training_steps` steps.

    A weight is ranked by its module's output; inputs and outputs that are targets, by themselves.

    Args:
        model, config_list, evaluator: see `Pruner`.
        training_steps: optimizer steps over which outputs are watched before a decision.
        activation: one of `ACTIVATIONS`.
    """

    fusion_order = ("training_steps", "activation", "evaluator")
    ranks_values = True

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 100,
        activation: str = "relu",
    ) -> None:
        self.activation = activation
        super().__init__(model, config_list, evaluator, training_steps)

    @staticmethod
    @abstractmethod
    def judge(value: Tensor) -> Tensor:
        """What of an output behind the activation is averaged, elementwise."""

    def watcher(self, target_id: TargetId) -> tuple[TargetId, BlockWatcher] | None:
        layout = self.layouts[target_id]
        function = partial(judged, activation=ACTIVATIONS[self.activation], judge=type(self).judge)
        if not layout.is_parameter:
            return target_id, BlockMeans(str(target_id), self.grid(target_id), function)
        output = TargetId(target_id.module, "_output_0")
        means = BlockMeans(str(output), [1, layout.output_channels], function, channel_dim=layout.value_channel_dim)
        return output, means

    def of_watched(self, target_id: TargetId, watcher: BlockWatcher) -> Tensor:
        assert isinstance(watcher, BlockMeans)
        return watcher.mean().view(self.grid(target_id))

    def _goal_problems(self, target_id: TargetId, selected: Selected) -> list[Problem]:
        problems = super()._goal_problems(target_id, selected)
        layout = self.layouts[target_id]
        if problems or not layout.is_parameter:
            return problems
        is_layer = target_id.target in ("weight", "bias") and layout.value_channel_dim is not None
        if not is_layer or isinstance(self.model.get_submodule(target_id.module), nn.Embedding):
            message = f"{target_id} has no channels that an output of its module shows"
            problems.append(Problem(selected.where, message, "name weights of convolutions, linear layers or norms"))
        elif self._granularity(target_id) != "out_channel":
            message = f"{target_id} is ranked by its module's output, a value for each output channel"
            problems.append(Problem(f"{selected.where}.granularity", message, "out_channel"))
        return problems
