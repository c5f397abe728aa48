"""What each micro-batch of a step weighs: by samples, by the items that the loss is a mean of, and by positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch

from raycomp.core.batch_share import BatchShare
from raycomp.core.reduction import sum_over_ranks_, world_size
from raycomp.errors import TaskError
from raycomp.pipeline.data.plan import MicroBatch
from raycomp.pipeline.task import Task
from raycomp.pipeline.user_code import user_code


def weighted_shares(task: Task, step: Sequence[MicroBatch]) -> list[BatchShare]:
    """The shares of a step's micro-batches, with their weights. A collective: every rank calls it for every step.

    Raises:
        TaskError: the task can't count.
    """
    counts = torch.tensor([_counts(task, micro_batch) for micro_batch in step], dtype=torch.float64)
    total = counts.sum(0)
    sum_over_ranks_(total)
    all_samples = sum(micro_batch.share.total for micro_batch in step)
    all_items, all_positions = total.tolist()
    return [
        replace(
            share,
            loss_weight=_weight(items, all_items),
            sample_weight=_weight(share.samples, all_samples),
            position_weight=_weight(positions, all_positions),
        )
        for (_, share), (items, positions) in zip(step, counts.tolist(), strict=True)
    ]


def _weight(mine: float, everyones: float) -> float:
    return mine / everyones * world_size() if everyones else 0.0


def _counts(task: Task, micro_batch: MicroBatch) -> tuple[float, int]:
    if not micro_batch.share.samples:
        return 0.0, 0
    name = type(task).__name__
    with user_code(f"{name}.loss_items()"):
        items = float(task.loss_items(micro_batch.batch))
    if not 0 <= items < inf:
        raise TaskError(f"loss_items gave {items}", where=name, remedy="give a number, 0 or more")
    with user_code(f"{name}.attention_mask()"):
        positions = task.attention_mask(micro_batch.batch)
    return items, 0 if positions is None else int(positions.sum())
