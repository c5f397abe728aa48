"""Pruning by the mean activation."""

from __future__ import annotations

from torch import Tensor

from raycomp.pruning.bases.activations import ActivationPruner


class ActivationMeanRankPruner(ActivationPruner):
    """Prunes the channels whose outputs behind the activation are smallest on average.

    The saliency, and what a threshold is held against, is that mean (Molchanov et al., Pruning Convolutional Neural
    Networks for Resource Efficient Inference, arXiv:1611.06440, the criterion `mean activation`). See
    `ActivationPruner` for the arguments.
    """

    @staticmethod
    def judge(value: Tensor) -> Tensor:
        return value
