"""Pruners: masks on the targets of a model, made while it trains."""

from raycomp.pruning.agp import AGPPruner
from raycomp.pruning.l1_norm import L1NormPruner
from raycomp.pruning.linear import LinearPruner
from raycomp.pruning.lottery_ticket import LotteryTicketPruner
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.slim import SlimPruner
from raycomp.pruning.taylor import TaylorPruner

__all__ = [
    "AGPPruner",
    "L1NormPruner",
    "LinearPruner",
    "LotteryTicketPruner",
    "Pruner",
    "SlimPruner",
    "TaylorPruner",
]
