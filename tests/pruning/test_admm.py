"""ADMM against a NumPy loop: Z and U over the rounds, the gradient of the term, and how long a round is."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.core.target import TargetId
from raycomp.pruning import ADMMPruner, TaylorPruner
from tests.contracts.tiny import job
from tests.contracts.training import train

RHO = 0.5
RATE = 0.1
KEY = TargetId("0", "weight")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False)).double()


BATCHES = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double() for seed in range(2)]


class Loop:
    """A training function whose epochs are both batches; notes how many epochs each round has."""

    def __init__(self) -> None:
        self.epochs: list[int | None] = []
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.pruner: Any = None

    def __call__(self, model: Any, optimizer: Any, step: Any, schedulers: Any, max_steps: Any, epochs: Any) -> None:
        self.epochs.append(epochs)
        if self.pruner is not None and self.pruner.sparse:
            self.seen.append((self.pruner.sparse[KEY].clone(), self.pruner.gap[KEY].clone()))
        for _ in range(epochs):
            for batch in BATCHES:
                optimizer.zero_grad()
                step(batch, model).backward()
                optimizer.step()


def evaluator_of(model: nn.Module, loop: Loop) -> TorchEvaluator:
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    return TorchEvaluator(loop, optimizer, lambda batch, model: model(batch).square().sum() / 2)


def projected(value: numpy.ndarray, rows: bool) -> numpy.ndarray:
    """The half with the smallest L2 norms set to zero."""
    norms = (
        numpy.linalg.norm(value, axis=1, keepdims=True) * numpy.ones_like(value) if rows else numpy.abs(value)
    ).ravel()
    count = 3 if rows else value.size // 2
    border = numpy.sort(norms)[:: 4 if rows else 1][count]
    return numpy.where(norms.reshape(value.shape) >= border, value, 0.0)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("iterations", "epochs"), [(1, 1), (3, 2)])
def test_the_rounds_are_those_of_a_loop(rows: bool, iterations: int, epochs: int) -> None:
    model, loop = network(), Loop()
    weight = model[0].weight.detach().numpy().copy()
    sparse, gap, expected = weight.copy(), numpy.zeros_like(weight), []
    for turn in range(iterations):
        expected.append((sparse, gap))
        for _ in range(epochs):
            for batch in BATCHES:
                values = batch.numpy()
                weight = weight - RATE * (weight @ values.T @ values + RHO * (weight - sparse + gap))
        if turn < iterations - 1:
            sparse = projected(weight + gap, rows)
            gap = gap + weight - sparse
    mask = projected(weight, rows) != 0
    entry = {"op_names": ["0"], "sparse_ratio": 0.5, **({"granularity": "out_channel"} if rows else {})}
    pruner = ADMMPruner(model, [entry], evaluator_of(model, loop), iterations, epochs, RHO)
    loop.pruner = pruner
    pruner.compress(max_epochs=3)
    # One more round, as long as the user says, without the term.
    assert loop.epochs == [epochs] * iterations + [3]
    for (found_z, found_u), (z, u) in zip(loop.seen, expected, strict=True):
        numpy.testing.assert_allclose(found_z.numpy(), z, rtol=1e-12, atol=1e-15)
        numpy.testing.assert_allclose(found_u.numpy(), u, rtol=1e-12, atol=1e-15)
    assert numpy.array_equal(pruner.get_masks()["0"]["weight"].numpy() == 1, mask)
    for _ in range(3):
        for batch in BATCHES:
            values = batch.numpy()
            weight = weight - RATE * mask * ((weight * mask) @ values.T @ values)
    numpy.testing.assert_allclose(model[0].weight.detach().numpy(), weight * mask, rtol=1e-11)


def test_the_terms_gradient_is_rho_times_the_gap() -> None:
    model = network()
    pruner = ADMMPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], rho=RHO)
    pruner.chain.begin()
    generator = torch.Generator().manual_seed(3)
    pruner.sparse[KEY] = torch.randn(6, 4, generator=generator).double()
    pruner.gap[KEY] = torch.randn(6, 4, generator=generator).double()
    term = pruner.loss_term(None)
    assert term is not None
    weight = pruner.chain.space.parameter(KEY)
    expected = weight.detach() - pruner.sparse[KEY] + pruner.gap[KEY]
    assert float(term.detach()) == pytest.approx(RHO / 2 * float(expected.square().sum()), rel=1e-12)
    term.backward()
    assert torch.allclose(weight.grad, RHO * expected, rtol=1e-12)


def test_a_leader_that_decides_in_the_midst_of_a_round_ends_none() -> None:
    """What follows an earlier pruner's masks follows them at once; Z and U stay."""
    torch.manual_seed(0)
    model, loop = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 6)).double(), Loop()
    leader = TaylorPruner(
        model, [{"op_names": ["1"], "sparse_ratio": 0.5}], evaluator_of(model, loop), training_steps=1
    )
    align = {"module_name": "1", "target_name": "weight", "dims": [1]}
    entries = [
        {"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5},
        {"op_names": ["1"], "target_names": ["_input_"], "align": align},
    ]
    pruner = ADMMPruner.from_compressor(leader, entries, iterations=2, training_epochs=1, rho=RHO)
    loop.pruner = pruner
    pruner.compress(max_epochs=1)
    assert len(loop.seen) == 2
    assert bool(loop.seen[1][1].any())
    assert float(pruner.get_masks()["0"]["weight"].mean()) == 0.5


def test_a_jobs_rounds_are_as_long_as_the_pruner_says() -> None:
    admm = {
        "type": "ADMMPruner",
        "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
        "iterations": 2,
        "training_epochs": 3,
    }
    # Single weights are pruned, so that convolutions whose outputs are added have masks of their own shapes.
    chain = train(job(admm, arguments={"samples": 32}, steps=5))
    # Two rounds of 3 epochs of 2 batches, then the user's 5 steps.
    assert (chain.round, chain.step) == (3, 2 * 3 * 2 + 5)
    assert chain.sparsity() > 0.4
