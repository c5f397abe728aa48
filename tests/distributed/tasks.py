"""Tasks that meet with accidents."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.contracts.tiny import Tiny


class Struck(Tiny):
    """One of its workers is killed in the middle of a step, once.

    Args:
        marker: a file that tells that it has happened.
        rank: whose worker.
        step: counted from 1.
        more: as `Tiny` has them.
    """

    def __init__(self, marker: str, rank: int = 1, step: int = 6, **more: Any) -> None:
        super().__init__(**more)
        self.marker = Path(marker)
        self.rank = rank
        self.step = step
        self.steps = 0

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        self.steps += 1
        if self.steps == self.step and dist.get_rank() == self.rank and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(model, batch)


class _Unreadable(Dataset[Any]):
    def __init__(self, inner: Dataset[Any], length: int) -> None:
        self.inner, self.length = inner, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        # The first two are the example input.
        if index > 1 and dist.is_initialized() and dist.get_rank() == 1:
            raise ValueError(f"image {index} can't be read")
        return self.inner[index]


class Unreadable(Tiny):
    """Its data raises, on rank 1 alone; it counts how often a worker has begun in files of `folder`."""

    def __init__(self, folder: str, **more: Any) -> None:
        super().__init__(**more)
        self.folder = Path(folder)

    def train_data(self) -> Any:
        if dist.is_initialized():
            (self.folder / f"{dist.get_rank()}-{os.getpid()}").touch()
        return _Unreadable(super().train_data(), self.samples)


class Diverging(Tiny):
    """From a step on, rank 1 meets a pixel that is no number."""

    def __init__(self, step: int, **more: Any) -> None:
        super().__init__(**more)
        self.step = step
        self.steps = 0

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        self.steps += 1
        images, target = batch
        if self.steps >= self.step and dist.is_initialized() and dist.get_rank() == 1:
            images = images.clone()
            images[0, 0, 0, 0] = math.nan
        return super().training_step(model, (images, target))
