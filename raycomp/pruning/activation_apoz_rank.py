"""Pruning by the average percentage of zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomp.pruning.bases.activations import ActivationPruner


class ActivationAPoZRankPruner(ActivationPruner):
    """Prunes the channels whose outputs behind the activation are zero most often.

    The saliency, and what a threshold is held against, is 1 − APoZ: the fraction of outputs that aren't zero (Hu et
    al., Network Trimming, arXiv:1607.03250). See `ActivationPruner` for the arguments.
    """

    @staticmethod
    def judge(value: Tensor) -> Tensor:
        # In one pass, where `(value != 0).to(…)` would make two of it.
        return torch.ne(value, 0, out=torch.empty_like(value))
