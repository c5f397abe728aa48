"""Outputs that a distiller compares."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from raycomp.core.target import TargetId
from raycomp.errors import CompressionError


class Recorder(nn.Module):
    """Keeps what passes while it is open; a copy starts empty, because tensors of a live graph can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.open = False
        self.values: list[Tensor] = []

    def forward(self, value: Tensor) -> None:
        """Keeps `value`, in training mode."""
        if self.open and self.training:
            self.values.append(value)

    def take(self, target_id: TargetId) -> list[Tensor]:
        """What passed since the last take, one entry for each time that the module ran.

        Raises:
            CompressionError: nothing passed.
        """
        if not self.values:
            raise CompressionError("this module didn't run in the forward pass", where=str(target_id))
        values, self.values = self.values, []
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "values": []}
