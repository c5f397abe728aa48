"""Which forward passes count: those of a training step, or of a calibration, and no others.

Evaluation between steps, a forward pass beside the step, one without gradients, and the recomputation of activation
checkpointing pass through the same modules; what is watched is told by the loop, not by `module.training`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Watched = Literal["training", "calibration"]

_WATCHED: ContextVar[Watched | None] = ContextVar("raycomp_watched", default=None)


@contextmanager
def watch(what: Watched) -> Iterator[None]:
    """Within the block, forward passes are those of a training step or of a calibration."""
    token = _WATCHED.set(what)
    try:
        yield
    finally:
        _WATCHED.reset(token)


def in_training_step() -> bool:
    """Whether this forward pass is the one that a training step differentiates."""
    return _WATCHED.get() == "training" and torch.is_grad_enabled() and not _recomputes()


def is_watched(what: Watched) -> bool:
    """Whether this forward pass counts for statistics of a training step, or of a calibration."""
    return in_training_step() if what == "training" else _WATCHED.get() == "calibration"


def _recomputes() -> bool:
    # Activation checkpointing runs parts of the forward pass again within the backward pass.
    return torch._C._current_graph_task_id() != -1
