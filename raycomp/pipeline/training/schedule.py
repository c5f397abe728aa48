"""Stepping a learning-rate schedule of the user's."""

from __future__ import annotations

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from raycomp.pipeline.user_code import user_code


def follows_metric(scheduler: LRScheduler | None) -> bool:
    """Whether a schedule is stepped after each epoch with the main metric, instead of after each optimizer step."""
    return isinstance(scheduler, ReduceLROnPlateau)


def step_schedule(scheduler: LRScheduler, name: str, metric: float) -> None:
    """Steps a schedule, one that follows the metric with it.

    Args:
        scheduler: the user's.
        name: of what gave it, for errors.
        metric: the epoch's.

    Raises:
        TaskError: it raised.
    """
    with user_code(f"the step of {name}"):
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(metric)
        else:
            scheduler.step()
