"""Distances between a student's and a teacher's outputs. Pure tensor functions, means over samples and positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_TEMPERATURE = 2.0

Distance = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`distance(student, teacher, counted)`: of two outputs [samples, ...] of one shape, of shape []. Where `counted`, bool
[samples, length], is given, the mean is one over the positions that it names."""


def mse(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean squared difference."""
    if counted is None:
        return functional.mse_loss(_precise(student), _precise(teacher))
    return _mean((_precise(student) - _precise(teacher)).square(), counted)


def kl(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """The Kullback-Leibler divergence of the last dimension's softmax at temperature 2, times its square: the mean over
    all other dimensions (Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531)."""
    student = functional.log_softmax(_precise(student) / _TEMPERATURE, dim=-1)
    target = functional.softmax(_precise(teacher) / _TEMPERATURE, dim=-1)
    # A class that the teacher rules out (-inf) adds nothing, whatever the student makes of it.
    student = student.masked_fill(target == 0, 0.0)
    if counted is None:
        divergence = functional.kl_div(student.flatten(0, -2), target.flatten(0, -2), reduction="batchmean")
    else:
        divergence = _mean(functional.kl_div(student, target, reduction="none").sum(-1), counted)
    return divergence * _TEMPERATURE**2


DISTANCES: dict[str, Distance] = {"mse": mse, "kl": kl}


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of `values` [samples, length, ...] over the positions that count; 0 where none does."""
    sums = torch.where(counted, values.flatten(2).mean(2) if values.dim() > 2 else values, 0).sum()
    return sums / counted.sum().clamp(min=1)


def _precise(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
