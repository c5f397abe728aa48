"""Distances between a student's and a teacher's outputs. Pure tensor functions, means over the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_TEMPERATURE = 2.0


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference."""
    return functional.mse_loss(_precise(student), _precise(teacher))


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of the last dimension's softmax at temperature 2, times its square
    (Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531)."""
    student = functional.log_softmax(_precise(student) / _TEMPERATURE, dim=-1)
    target = functional.softmax(_precise(teacher) / _TEMPERATURE, dim=-1)
    return functional.kl_div(student, target, reduction="batchmean") * _TEMPERATURE**2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "kl": kl}


def _precise(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
