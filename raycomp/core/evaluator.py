"""What compressors ask of whoever trains the model: plain torch, a job's stage, Lightning, transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from raycomp.core.moments import RunContext


class Trainee(Protocol):
    """The model under compression, as a training loop sees it: a `Chain`."""

    model: nn.Module

    def run(self, context: RunContext | Sequence[Optimizer]) -> AbstractContextManager[None]:
        """Within the block every step of the optimizers is a step of the compressors."""

    def training_step(self, step_fn: Callable[[], Any], batch: Any) -> Any:
        """Runs the user's training step as one that is watched, with what compressors add to its loss."""

    def end_round(self) -> None:
        """The last step of a round is done: decisions that fall at its end are made."""

    def calibrating(self) -> AbstractContextManager[None]:
        """Within the block the model calibrates; at its end the decisions that rest on it are made."""

    def calibration_step(self, step_fn: Callable[[], Any]) -> Any:
        """Runs the user's training step forward only, as one that is watched."""

    def users_state(self) -> dict[str, Tensor]:
        """A copy of the state dict of the model as the user wrote it."""

    def restore_users_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over `users_state()`."""

    def unheld_parameters(self, optimizers: Sequence[Optimizer]) -> list[str]:
        """The names of trainable parameters that no optimizer holds."""


@runtime_checkable
class Evaluator(Protocol):
    """Trains, calibrates and judges a model."""

    @property
    def example(self) -> Any:
        """An example input of the model, None where there is none."""

    def train(self, trainee: Trainee, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """One training run in which all compressors take part; calls `trainee.end_round()` when its last step is done,
        before anything is saved."""

    def calibrate(self, trainee: Trainee, max_steps: int | None = None) -> None:
        """Passes training batches through the model, forward only, in evaluation mode; nothing trains."""

    def evaluate(self, model: nn.Module) -> Any:
        """The user's metric of `model`."""

    def reset(self) -> None:
        """Gives the next training run fresh optimizers and learning-rate schedules."""
