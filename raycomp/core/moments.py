"""The moments of a compression, which a chain knows and in which its members act. All of them do nothing by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raycomp.core.masks import Masks
from raycomp.core.reduction import Statistic

Calibration = dict[str, dict[str, dict[str, Any]]]
"""{module: {target: {scale, zero_point, quant_dtype, …}}}"""


class Turn(IntEnum):
    """Which decisions of one moment fall first: all masks are set before any range is taken."""

    MASKS = 0
    RANGES = 1


@dataclass(frozen=True)
class Moment:
    """When a decision may fall.

    Args:
        event: `begin` (before the first step), `step` (an optimizer step is done), `round` (a round of training has
            ended, its last checkpoint not yet written), `calibrated` (all of the calibration has passed).
        step: optimizer steps done, over all rounds.
        round: the round, counted from 0.
    """

    event: Literal["begin", "step", "round", "calibrated"]
    step: int
    round: int = 0


@dataclass(frozen=True)
class RunContext:
    """What a training run gives to the members of the chain.

    Args:
        optimizers: the user's.
        schedulers: the user's.
        steps_per_epoch: optimizer steps in an epoch; None where only reading the data would tell.
        total_steps: of this run; None where the user's own loop says.
        example: an example input of the model; None where there is none.
        evaluate: gives the user's metric of the model as it is now; None where there is none. A collective.
        generator: the chain's own, seeded alike on all ranks and saved with it; the chain puts it here.
    """

    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler] = ()
    steps_per_epoch: int | None = None
    total_steps: int | None = None
    example: Any = None
    evaluate: Callable[[], Any] | None = None
    generator: torch.Generator | None = None


class Moments:
    """A member of a chain: what it needs, the moments in which it acts, and what it has to give."""

    turn: ClassVar[Turn] = Turn.MASKS
    """Which decide before this one at the same moment: all those of a lower turn."""

    # What it needs.

    @property
    def rounds(self) -> int:
        """Training runs that it needs, 0 for none."""
        return 0

    @property
    def rewinds(self) -> bool:
        """Whether each round begins with the weights that the first one began with."""
        return False

    def epochs_of(self, round: int) -> int | None:
        """How many epochs a round of training has (counted from 0); None where the user says how long it is."""
        return None

    @property
    def calibrates(self) -> bool:
        """Whether it needs a calibration after the training."""
        return False

    @property
    def wants_training(self) -> bool:
        """Whether a stage that it stands in trains: also one that decides at once wants its model fine-tuned."""
        return not self.calibrates

    @property
    def calibration_steps(self) -> int | None:
        """Batches of its calibration; None for one pass over the training data."""
        return None

    # Standing on the model.

    def attach(self) -> None:
        """Puts its transforms on their targets."""

    def commit(self) -> None:
        """Writes into the weights what must outlive the targets."""

    # The moments of a training run, in their order.

    def begin_run(self, context: RunContext) -> None:
        """A training run begins."""

    @property
    def loss_weight(self) -> float:
        """What the task's own loss is multiplied by; the terms of other members are not."""
        return 1.0

    def loss_term(self, batch: Any) -> Tensor | None:
        """What it adds to the loss of a (micro-)batch whose forward pass is done: this rank's part of it, which
        `weighted_by_samples` makes of a mean over samples, or of what doesn't depend on them."""
        return None

    def before_step(self, step: int) -> None:
        """The gradients of optimizer step `step` (counted from 1) are reduced and not yet used."""

    def is_due(self, moment: Moment) -> bool:
        """Whether it decides at this moment."""
        return False

    def statistics(self) -> list[Statistic]:
        """What a due decision rests on; merged over all workers, in place, before `decide`."""
        return []

    def decide(self, moment: Moment) -> None:
        """Makes the due decision from the merged statistics."""

    def rewind(self) -> None:
        """The weights were taken back to the first ones: what it tracked of a round begins anew."""

    def end_run(self) -> None:
        """A training run ends, also by an error."""

    # What it has to give.

    def rehearse(self) -> None:
        """Makes a decision as it will come, from made-up statistics: what can't be decided is told before training."""

    def running_statistics(self) -> list[Statistic]:
        """What this rank has gathered for a decision to come; a checkpoint holds it merged over the ranks."""
        return []

    def get_masks(self) -> Masks:
        """Its masks."""
        return Masks()

    def get_calibration_config(self) -> Calibration:
        """Its scales."""
        return {}

    def folds(self) -> list[tuple[str, ...]]:
        """The module groups that it runs as one operator."""
        return []

    def notes(self) -> list[str]:
        """What the user should be told at the end of a round."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that resume it exactly, beside the model's state dict and what it gathers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`."""
