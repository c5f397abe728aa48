"""Pruning little by little: the base of the schedules around a basic pruner."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import nn

from raycomp.core.chain import Chain, Masks
from raycomp.core.compressor import Compressor
from raycomp.core.evaluator import TorchEvaluator
from raycomp.errors import ConfigError, Problem
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.schedule import Schedule


class ScheduledPruner:
    """Drives a basic pruner through a schedule; the pruner stays the one in the chain, and what is fused sees its masks grow.

    Args:
        pruner: the basic pruner that ranks and masks.
        interval_steps: optimizer steps between two decisions; at least the pruner's `training_steps`.
        total_times: the number of decisions; the last one reaches the goal.
        evaluator: how to train, where the pruner has no evaluator yet.

    Raises:
        ConfigError: a decision would rest on more steps than lie before it.
    """

    def __init__(
        self, pruner: Pruner, interval_steps: int, total_times: int, evaluator: TorchEvaluator | None = None
    ) -> None:
        self.pruner = pruner
        if pruner.window > interval_steps:
            message = f"interval_steps {interval_steps} is below the pruner's training_steps {pruner.window}"
            raise ConfigError([Problem("interval_steps", message, f"at least {pruner.window}")])
        pruner.schedule = self.schedule(interval_steps, total_times)
        pruner.evaluator = pruner.evaluator or evaluator

    @classmethod
    def from_compressor(cls, compressor: Pruner, *args: Any, **kwargs: Any) -> ScheduledPruner:
        """The same as the constructor: the schedule is of the pruner that it is given."""
        return cls(compressor, *args, **kwargs)

    @staticmethod
    @abstractmethod
    def schedule(interval_steps: int, total_times: int) -> Schedule:
        """The decisions."""

    @property
    def chain(self) -> Chain:
        """The fused compressors."""
        return self.pruner.chain

    @property
    def evaluator(self) -> TorchEvaluator | None:
        """How to train."""
        return self.pruner.evaluator

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """One training run; returns the model and its masks."""
        return Compressor.compress(self.pruner, max_steps, max_epochs)

    def get_masks(self) -> Masks:
        """{module: {target: mask}}; 1 = keep."""
        return self.pruner.get_masks()

    def wrap_model(self) -> None:
        """Attaches all fused compressors' targets again."""
        self.chain.wrap()

    def unwrap_model(self) -> None:
        """Commits the masks into the weights and takes all fused compressors off the model."""
        self.chain.unwrap()
