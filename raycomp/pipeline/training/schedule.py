"""Stepping a learning-rate schedule of the user's."""

from __future__ import annotations

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raycomp.pipeline.user_code import user_code


def step_schedule(scheduler: LRScheduler | None, name: str, metric: float | None = None) -> None:
    """Steps a schedule if it is its turn: one that follows the metric after each epoch, any other after each step.

    Args:
        scheduler: the user's, if there is one.
        name: of what gave it, for errors.
        metric: the main one of an epoch that ends; None after an optimizer step.

    Raises:
        TaskError: it raised.
    """
    with user_code(f"the step of {name}"):
        if isinstance(scheduler, ReduceLROnPlateau):
            if metric is not None:
                scheduler.step(metric)
        elif scheduler is not None and metric is None:
            scheduler.step()
