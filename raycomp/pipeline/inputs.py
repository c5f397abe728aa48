"""What the task's model is called with, out of real data: to trace, to verify, to export and to measure with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from raycomp.pipeline.data.batches import batches_of, first_batch, is_map_style
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.task import Task, given_data
from raycomp.pipeline.user_code import user_code

_PROBES = 8


def real_inputs(task: Task, dtype: torch.dtype, count: int = 8) -> Any:
    """The model's inputs of the first evaluation samples: a tensor, positional arguments, or arguments by name."""
    data = given_data(task, "eval")
    with user_code(f"{type(task).__name__}.eval_data()"):
        return _inputs(task, first_batch(task, data, count), dtype)


def differing_inputs(task: Task, dtype: torch.dtype, count: int = 2) -> tuple[Any, ...]:
    """Inputs of batches from all over the data, the largest and the smallest; none where all have the same sizes.

    Sizes differ where batches are padded to their longest text, or images keep their size. Batches of few samples tell
    it best, since large ones are nearly all as long as the longest sample.
    """
    found: dict[tuple[Any, ...], Any] = {}
    for split in ("eval", "train"):
        data = given_data(task, split)
        with user_code(f"{type(task).__name__}.{split}_data()"):
            for batch in _batches(task, data, count, _PROBES):
                inputs = _inputs(task, batch, dtype)
                found.setdefault(_sizes(inputs), inputs)
    ordered = sorted(found, key=lambda sizes: sum(map(torch.Size.numel, sizes)))
    return (found[ordered[-1]], found[ordered[0]]) if len(ordered) > 1 else ()


def _batches(task: Task, data: Any, count: int, number: int) -> Iterator[Any]:
    """Up to `number` batches of `count` samples, spread over the data where it can be indexed."""
    if not is_map_style(data):
        yield from islice(batches_of(task, data, count), number)
        return
    count = min(count, len(data))
    for first in dict.fromkeys(round(part * (len(data) - count) / max(number - 1, 1)) for part in range(number)):
        yield task.collate([data[position] for position in range(first, first + count)])


def _inputs(task: Task, batch: Any, dtype: torch.dtype) -> Any:
    args, kwargs = task.inputs(move_batch(batch, "cpu", dtype))
    return kwargs if kwargs else args[0] if len(args) == 1 else args


def _sizes(inputs: Any) -> tuple[torch.Size, ...]:
    """The shapes of the tensors, the batch aside."""
    return tuple(leaf.shape[1:] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
