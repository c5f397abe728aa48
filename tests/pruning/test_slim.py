"""Network slimming: penalty and optimizer by hand, saliencies, and factors that end up in the weights."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor, nn

from raycomp.core.moments import RunContext
from raycomp.core.target import TargetId
from raycomp.pruning import AGPPruner, LotteryTicketPruner, SlimPruner

ONES = torch.ones(1, 3)


class Scale(nn.Module):
    """Multiplies by its weight."""

    def __init__(self, *weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.weight


def network() -> nn.Sequential:
    return nn.Sequential(Scale(1.0, -2.0, 3.0), Scale(0.5, 4.0, 1.0))


def slim(model: nn.Module, steps: int = 2, scale: float = 0.5, ratio: float = 0.4) -> SlimPruner:
    entry = {"op_types": ["Scale"], "target_names": ["weight"], "sparse_ratio": ratio}
    return SlimPruner(model, [entry], training_steps=steps, regular_scale=scale)


def run(pruner: SlimPruner, steps: int, learning_rate: float = 0.0) -> list[float]:
    """The loss of each step; the task's is the sum of the outputs."""
    losses = []
    optimizer = torch.optim.SGD(pruner.model.parameters(), learning_rate)
    with pruner.chain.run(RunContext([optimizer])):
        for _ in range(steps):
            loss = pruner.chain.training_step(lambda: pruner.model(ONES.double()).sum(), None)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def by_hand(steps: int, penalized: int, scale: float = 0.5) -> tuple[numpy.ndarray, list[float]]:
    """Adam (1e-2, 0.9, 0.999, 1e-8) on the factors of both layers under the penalty of so many steps."""
    weights = numpy.array([[1.0, -2.0, 3.0], [0.5, 4.0, 1.0]])
    factors, first, second = numpy.ones((2, 3)), numpy.zeros((2, 3)), numpy.zeros((2, 3))
    losses = []
    for step in range(1, steps + 1):
        on = step <= penalized
        losses.append(float((weights * factors).prod(0).sum() + on * scale * numpy.abs(factors).sum() / 2))
        gradient = (weights * factors).prod(0) / factors + on * scale * numpy.sign(factors) / 2
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**step), numpy.sqrt(second / (1 - 0.999**step))
        factors = factors - 1e-2 * corrected[0] / (corrected[1] + 1e-8)
    return factors, losses


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_penalty_and_adam_are_those_computed_by_hand(steps: int) -> None:
    # The penalty ends with the decision after step 2, the factors go on.
    pruner = slim(network())
    factors, losses = by_hand(steps, 2)
    if steps > 2:
        # What is masked gives neither loss nor gradient, so nothing is masked here.
        pruner = slim(network(), ratio=0.0)
    assert run(pruner, steps) == pytest.approx(losses, rel=1e-12)
    found = torch.stack([factor.factor.detach() for factor in pruner.factors.values()])
    assert torch.allclose(found, torch.from_numpy(factors), rtol=1e-12)


def test_the_penalty_lasts_from_the_first_step_to_the_last_decision() -> None:
    # Without a task's loss the loss is the penalty: 0.5 × 6 ones / 2 layers at first.
    def penalties(pruner: SlimPruner, steps: int) -> list[bool]:
        return [loss > 0 for loss in run(pruner, steps)]

    assert penalties(slim(zero(), 4), 6) == [True] * 4 + [False] * 2
    gradual = slim(zero(), 2)
    AGPPruner(gradual, 2, 2)
    assert penalties(gradual, 6) == [True] * 4 + [False] * 2
    assert run(slim(zero(), 1), 1) == [1.5]


def zero() -> nn.Sequential:
    return nn.Sequential(Scale(0.0, 0.0, 0.0), Scale(0.0, 0.0, 0.0))


def test_in_rounds_the_penalty_lasts_until_the_last_round_with_a_decision() -> None:
    pruner = slim(zero(), 2)
    chain = LotteryTicketPruner(pruner, 2).chain
    found = []
    for _ in range(3):
        found.append([loss > 0 for loss in run(pruner, 2)])
        chain.end_round()
        chain.rewind()
    assert found == [[True] * 2, [True] * 2, [False] * 2]


def test_the_magnitude_of_a_factor_ranks_and_its_weight_does_not() -> None:
    pruner = slim(network(), 1, 0.0)
    first, second = pruner.factors.values()
    with torch.no_grad():
        first.factor.copy_(torch.tensor([-3.0, 0.5, 2.0]))
        second.factor.copy_(torch.tensor([1.0, 9.0, -0.25]))
    assert [saliency.tolist() for saliency in pruner.saliencies().values()] == [[3, 0.5, 2], [1, 9, 0.25]]
    run(pruner, 1)
    masks = pruner.get_masks()
    assert masks["0"]["weight"].tolist() == [1, 0, 1]
    assert masks["1"]["weight"].tolist() == [1, 1, 0]


def test_unwrapping_multiplies_the_factors_into_the_weights() -> None:
    model = network()
    pruner = slim(model, 1)
    first, second = pruner.factors.values()
    with torch.no_grad():
        first.factor.copy_(torch.tensor([0.5, 3.0, -2.0]))
        second.factor.copy_(torch.tensor([4.0, 0.5, 2.0]))
    assert model(ONES.double()).tolist() == [[0.5 * 2, -6 * 2, -6 * 2]]
    pruner.chain.begun = True
    pruner.set_masks(pruner.saliencies(), 1.0)
    simulated = model(ONES.double())
    pruner.unwrap_model()
    assert model[0].weight.tolist() == [0, -6, -6]
    assert model[1].weight.tolist() == [2, 0, 2]
    assert torch.equal(model(ONES.double()), simulated)
    pruner.wrap_model()
    assert torch.equal(model(ONES.double()), simulated)
    assert pruner.chain.space.parameter(TargetId("0", "weight")).tolist() == [0, -6, -6]


def test_factors_of_blocks_are_spread_over_them() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 9).view(2, 4))
    entry = {"op_names": ["0"], "sparse_ratio": 0.5, "granularity": [1, 2]}
    pruner = SlimPruner(model, [entry], training_steps=1)
    (factor,) = pruner.factors.values()
    assert factor.factor.shape == (2, 2)
    with torch.no_grad():
        factor.factor.copy_(torch.tensor([[1.0, 10], [100, 0]]))
    assert model[0].weight.tolist() == [[1, 2, 30, 40], [500, 600, 0, 0]]


def test_factors_of_half_precision_weights_are_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).bfloat16()
    pruner = SlimPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], training_steps=1)
    (factor,) = pruner.factors.values()
    assert factor.factor.dtype == torch.float32
    assert model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    pruner.unwrap_model()
    assert model[0].weight.dtype == torch.bfloat16


def test_nnis_order_of_arguments() -> None:
    first = slim(network())
    second = SlimPruner.from_compressor(
        first, [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5}], 7, 0.25
    )
    assert (second.training_steps, second.regular_scale) == (7, 0.25)
