"""Where training stands, as training says it and the report shows it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ProgressEvent:
    """Where training stands.

    Args:
        stage: the stage's name.
        epoch: the epoch under way or just ended, from 1.
        epochs: epochs of the stage.
        step: optimizer steps done in this stage.
        steps: optimizer steps of the stage.
        loss: training loss since the event before; None where nothing trained.
        metrics: the task's metrics where they were just evaluated, else empty.
        sparsity: fraction of masked elements among the pruned targets, in [0, 1].
        workers: number of workers that train.
        elapsed_s: seconds since the run began.
        learning_rate: of the user's first parameter group; None where nothing trains.
    """

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None
    metrics: dict[str, float]
    sparsity: float
    workers: int
    elapsed_s: float
    learning_rate: float | None = None
