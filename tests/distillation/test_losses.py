"""Distances by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raycomp.distillation.losses import DISTANCES


def test_mse_is_the_mean_of_squares() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert float(DISTANCES["mse"](student, teacher)) == (4 + 9) / 4


def test_kl_has_temperature_two_and_is_the_mean_over_the_batch() -> None:
    # At temperature 2 the odds are 3 : 1 and 1 : 4 in the first sample, and equal in the second.
    teacher = torch.tensor([[2 * math.log(3.0), 0.0], [1.0, 1.0]])
    student = torch.tensor([[0.0, 2 * math.log(4.0)], [0.0, 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.2) + 0.25 * math.log(0.25 / 0.8)
    assert float(DISTANCES["kl"](student, teacher)) == pytest.approx(4 * divergence / 2, rel=1e-6)
    # Of sequences it is the mean over their places.
    student, teacher = (torch.stack([value, value], dim=1) for value in (student, teacher))
    assert float(DISTANCES["kl"](student, teacher)) == pytest.approx(4 * divergence / 2, rel=1e-6)


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_bfloat16_is_compared_in_float32(name: str) -> None:
    value = torch.randn(3, 4).to(torch.bfloat16)
    assert DISTANCES[name](value, value).dtype == torch.float32
