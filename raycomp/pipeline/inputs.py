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

_PROBES = 16


def real_inputs(task: Task, dtype: torch.dtype, count: int = 8) -> Any:
    """The model's inputs of the first evaluation samples: a tensor, positional arguments, or arguments by name."""
    data = given_data(task, "eval")
    with user_code(f"{type(task).__name__}.eval_data()"):
        return _inputs(task, first_batch(task, data, count), dtype)


def differing_inputs(task: Task, dtype: torch.dtype, count: int = 2) -> tuple[Any, ...]:
    """Inputs of batches from all over the data, that differ wherever any do; none where all have the same sizes.

    The largest comes first, then the smallest, then whichever differs from them in another dimension.

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
    smallest_first = sorted(found, key=lambda sizes: sum(map(torch.Size.numel, sizes)))
    largest = smallest_first[-1]
    chosen = [largest]
    for sizes in smallest_first[:-1]:
        told = {place for other in chosen[1:] for place in _differing(largest, other)}
        if not _differing(largest, sizes) <= told:
            chosen.append(sizes)
    return tuple(found[sizes] for sizes in chosen) if len(chosen) > 1 else ()


def _differing(sizes: tuple[torch.Size, ...], others: tuple[torch.Size, ...]) -> set[tuple[int, int]]:
    """Tensor and dimension of each size that is another one."""
    return {
        (tensor, dim)
        for tensor, (left, right) in enumerate(zip(sizes, others, strict=False))
        for dim, (one, other) in enumerate(zip(left, right, strict=False))
        if one != other
    }


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
