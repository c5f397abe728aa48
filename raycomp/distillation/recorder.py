"""Outputs that a distiller compares."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from raycomp.core.target import TargetId
from raycomp.core.watching import in_training_step
from raycomp.errors import CompressionError


class Recorder(nn.Module):
    """Keeps what passes in a training step; a copy starts empty, because tensors of a live graph can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def forward(self, value: Tensor) -> None:
        """Keeps `value`, in the forward pass of a training step."""
        if in_training_step():
            self.values.append(value)

    def take(self, target_id: TargetId) -> list[Tensor]:
        """What passed since the last take, one entry for each time that the module ran.

        Raises:
            CompressionError: nothing passed.
        """
        if not self.values:
            message = "this module didn't run, with gradients, in the training step's forward pass"
            remedy = "a training function must use the training_step that it is given; activation checkpointing needs "
            raise CompressionError(message, where=str(target_id), remedy=f"{remedy}use_reentrant=False")
        values, self.values = self.values, []
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": []}
