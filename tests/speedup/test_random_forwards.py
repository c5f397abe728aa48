"""A forward that draws random numbers in evaluation mode is compared under the same draws."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.pruning import L1NormPruner
from raycomp.speedup import ModelSpeedup, draws, verify
from tests.contracts import tiny
from tests.contracts.training import Keeper, finish, train


class Noisy(nn.Module):
    """Adds noise of the outputs' shape, of every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, value: Tensor) -> Tensor:
        output = self.second(torch.relu(self.first(value)))
        return output + torch.randn_like(output) + random.random() + float(numpy.random.rand())


def test_the_cut_model_is_held_against_the_masked_one_under_the_same_draws() -> None:
    torch.manual_seed(0)
    model, values = Noisy(), torch.randn(4, 4)
    pruner = L1NormPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}])
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    smaller = ModelSpeedup(model, values, masks).speedup_model()
    assert smaller.first.out_features == 4
    assert verify(model, smaller, [values]).passed
    assert draws(model, values) and not draws(model.first, values)


def test_comparing_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    verify(Noisy(), Noisy(), [torch.randn(4, 4, generator=torch.Generator().manual_seed(0))], 1e9)
    torch.manual_seed(3)
    assert draws(Noisy(), torch.zeros(2, 4))
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


class Unseeded(Noisy):
    """Adds noise of a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(0)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.first(value)) + torch.rand(3, generator=self.own)


class Counting(Noisy):
    """Gives more with each call."""

    calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(value)) + self.calls


class OfPython(Noisy):
    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.first(value)) + random.random()


@pytest.mark.parametrize("kind", [Unseeded, Counting, OfPython])
def test_a_forward_that_differs_each_time_is_known_by_its_outputs(kind: type[Noisy]) -> None:
    assert draws(kind(), torch.ones(2, 4))


class DropsOut(tiny.TinyNet):
    """Monte Carlo dropout on channels that are pruned: a smaller model draws other numbers."""

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(functional.dropout(self.relu1(self.bn1(self.conv1(x))), 0.5, training=True)))


class DroppingOut(tiny.Tiny):
    """A task with that network."""

    def model(self) -> nn.Module:
        model = DropsOut()
        model.load_state_dict(super().model().state_dict())
        return model


def test_where_the_draws_are_cut_too_the_report_says_why_nothing_is(tmp_path) -> None:  # type: ignore[no-untyped-def]
    raw = tiny.job(tiny.pruner("L1NormPruner"), steps=2)
    raw["task"]["entrypoint"] = f"{__name__}:DroppingOut"
    train(raw, Keeper(tmp_path))
    result = finish(raw, tmp_path)
    reasons = {item.module: item.reason for item in result.unpruned}
    assert reasons["conv1"].endswith("nothing was cut; its forward gives other outputs each time, in evaluation, too")
    assert result.verification is not None and result.verification.passed
