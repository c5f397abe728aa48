"""What part of the global batch this rank holds at the moment.

The training loop states it around each forward pass; whoever computes a statistic of the batch (batch norm, observers,
losses) reads it, so that a mean over N workers weighs what it is a mean of (samples, tokens), and not workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchShare:
    """How many samples of the current (micro-)batch are on this rank.

    Args:
        samples: samples on this rank; 0 means that the batch at hand is a stand-in whose statistics must not count.
        total: samples over all ranks.
        loss_weight: what the task's loss, a mean over this rank's part of the batch, is multiplied by: gradients that
            are averaged over the ranks (as DDP does) and summed over the micro-batches are then those of the mean over
            the global batch. Ranks weigh by the items that the loss is the mean of.
        sample_weight: the same for a mean over samples.
        position_weight: the same for a mean over positions that count.
        positions: bool, [samples, length]: which positions of the samples' sequences count, as padding does not; None
            where there is no padding.
    """

    samples: int
    total: int
    loss_weight: float = 1.0
    sample_weight: float = 1.0
    position_weight: float = 1.0
    positions: Tensor | None = field(default=None, compare=False)


def rank_slice(total: int, rank: int, world: int) -> slice:
    """The contiguous part of `total` samples that a rank takes; sizes differ by one at most, rank 0 has the largest."""
    return slice(-(-total * rank // world), -(-total * (rank + 1) // world))


_SHARE: ContextVar[BatchShare | None] = ContextVar("raycomp_batch_share", default=None)


@contextmanager
def use_share(share: BatchShare) -> Iterator[None]:
    """Within the block, `current_share()` is `share`."""
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def current_share() -> BatchShare | None:
    """The share that the training loop stated; None where it states none (a user's own loop: ranks weigh the same)."""
    return _SHARE.get()


def is_idle() -> bool:
    """Whether the batch at hand is a stand-in on a rank without samples."""
    share = _SHARE.get()
    return share is not None and share.samples == 0


def has_no_items() -> bool:
    """Whether the loss of the batch at hand is a mean of nothing on this rank, and so no number perhaps."""
    share = _SHARE.get()
    return share is not None and share.loss_weight == 0


def weighted_loss(loss: Tensor, outputs: Sequence[Tensor] = ()) -> Tensor:
    """This rank's part of the task's loss over the global batch.

    Args:
        loss: the task's.
        outputs: what the model gave. Where the loss is a mean of no items, it is 0, with gradients of 0 that reach the
            parameters through these: its own may be no numbers.
    """
    share = _SHARE.get()
    if share is None:
        return loss
    if share.loss_weight:
        return loss * share.loss_weight
    if not outputs:
        return loss.nan_to_num(0.0, 0.0, 0.0) * 0
    return torch.stack([output.sum().to(loss.dtype) for output in outputs]).sum() * 0


def weighted_by_samples(mean: Tensor) -> Tensor:
    """This rank's part of a mean over the samples of the global batch, or of what doesn't depend on them."""
    share = _SHARE.get()
    return mean if share is None else mean * share.sample_weight


def counted_positions(value: Tensor) -> Tensor | None:
    """Which positions of `value` [samples, length, ...] count; None for all, also where it has no positions."""
    share = _SHARE.get()
    positions = None if share is None else share.positions
    return positions if positions is not None and value.dim() > 2 and value.shape[:2] == positions.shape else None


def weighted_by_positions(mean: Tensor) -> Tensor:
    """This rank's part of a mean over the positions that count."""
    share = _SHARE.get()
    return mean if share is None else mean * share.position_weight
