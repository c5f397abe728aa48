"""What part of the global batch this rank holds at the moment.

The training loop states it around each forward pass; whoever computes a statistic of the batch (batch norm, observers,
link losses) reads it, so that a statistic over N workers weighs samples and not workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchShare:
    """How many samples of the current (micro-)batch are on this rank.

    Args:
        samples: samples on this rank; 0 means that the batch at hand is a stand-in whose statistics must not count.
        total: samples over all ranks.
    """

    samples: int
    total: int

    @property
    def weight(self) -> float:
        """This rank's fraction of the samples."""
        return self.samples / self.total


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
