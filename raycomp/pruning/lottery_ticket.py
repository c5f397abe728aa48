"""Lottery tickets."""

from __future__ import annotations

from raycomp.core.evaluator import Evaluator
from raycomp.pruning.bases.scheduled import ScheduledPruner
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.schedule import RoundEnds, same_part_each_time


class LotteryTicketPruner(ScheduledPruner):
    """Trains, prunes, rewinds the weights to what they were at first, and trains again.

    After the t-th of `total_iteration` rounds the sparsity is 1 − (1 − goal)^(t/T): each round prunes the same part of
    what the one before it left. One more round trains the ticket that is left (Frankle and Carbin, The Lottery Ticket
    Hypothesis, arXiv:1803.03635). Each round has a fresh optimizer and schedule.

    Args:
        pruner: the basic pruner that ranks and masks, by default at the end of each round.
        total_iteration: rounds that end with a pruning.
        reset_weight: whether rounds begin with the first weights; else each goes on from the last one's.
        evaluator: how to train, where the pruner has no evaluator yet.
    """

    def __init__(
        self, pruner: Pruner, total_iteration: int, reset_weight: bool = True, evaluator: Evaluator | None = None
    ) -> None:
        super().__init__(pruner, RoundEnds(total_iteration, same_part_each_time, reset_weight), evaluator)
