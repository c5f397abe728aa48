"""What raycomp knows about a batch whose form only the user's task knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raycomp.errors import TaskError


def count_samples(batch: Any) -> int:
    """The number of samples in a batch: the size of the first dimension of the first tensor in it.

    Raises:
        TaskError: the batch holds no tensor with a dimension.
    """
    found = _first_tensor(batch)
    if found is None:
        raise TaskError(
            f"a batch of type {type(batch).__name__} holds no tensor to count its samples by",
            where="Task.count_samples",
            remedy="define count_samples(batch) in the task",
        )
    return found.shape[0]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.ndim else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return next((found for found in map(_first_tensor, value) if found is not None), None)
    return None


def move_batch(batch: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """The batch with its tensors on `device`; those of a floating type also become `dtype` where one is given.

    Lists, tuples, named tuples and mappings are entered; anything else is passed through. A mapping becomes a dict.
    """
    if isinstance(batch, Tensor):
        cast = dtype if dtype is not None and batch.is_floating_point() else batch.dtype
        return batch.to(device=device, dtype=cast, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move_batch(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_batch(value, device, dtype) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move_batch(value, device, dtype) for value in batch)
    return batch
