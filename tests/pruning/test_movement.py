"""Movement pruning: the gradient of its scores, its cubic schedule, and thresholds with a penalty, by a NumPy loop."""

from __future__ import annotations

from math import floor
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from raycomp.core.target import TargetId
from raycomp.pruning import MovementPruner

KEY = TargetId("0", "weight")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False)).double()


def scores_of(pruner: MovementPruner) -> torch.Tensor:
    return pruner.masks[KEY].scores  # type: ignore[return-value]


def steps(pruner: MovementPruner, count: int, rate: float = 0.0) -> list[dict[str, Any]]:
    """What is there after each step; the loss is half of the squared outputs' sum."""
    optimizer = torch.optim.SGD(pruner.model.parameters(), rate)
    seen = []
    with pruner.chain.run([optimizer]):
        for number in range(count):
            batch = batch_of(number)
            optimizer.zero_grad()
            loss = pruner.chain.training_step(lambda batch=batch: pruner.model(batch).square().sum() / 2, batch)
            loss.backward()
            optimizer.step()
            mask = pruner.get_masks()["0"]["weight"]
            seen.append(
                {
                    "loss": float(loss.detach()),
                    "mask": mask.numpy(),
                    "scores": scores_of(pruner).detach().numpy().copy(),
                }
            )
    return seen


def batch_of(number: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(number)).double()


@pytest.mark.parametrize(("granularity", "sizes"), [("out_channel", (1, 4)), ([1], (1, 1)), ([2, 2], (2, 2))])
def test_a_scores_gradient_is_that_of_a_factor_straight_through_the_mask(
    granularity: Any, sizes: tuple[int, int]
) -> None:
    model = network()
    weight = model[0].weight.detach().clone()
    entries = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": granularity}]
    pruner = MovementPruner(model, entries, cooldown_begin_step=2)
    pruner.chain.begin()
    mask = (torch.rand(6, 4, generator=torch.Generator().manual_seed(5)) > 0.5).double()
    pruner.masks[KEY].set_(mask)
    model(batch_of(0)).square().sum().backward()
    factors = torch.ones(6 // sizes[0], 4 // sizes[1], dtype=torch.float64, requires_grad=True)
    masked = (weight * mask).requires_grad_()
    (batch_of(0) @ masked.T).square().sum().backward()
    spread = factors.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
    # W·expand(S), at the gradient of the masked weight.
    ((weight * spread) * masked.grad).sum().backward()
    assert torch.allclose(scores_of(pruner).grad, factors.grad, rtol=1e-12)


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 4), (2, 7)])
def test_the_goal_grows_with_the_cubic_curve_and_then_stays(warmup: int, cooldown: int) -> None:
    pruner = MovementPruner(
        network(), [{"op_names": ["0"], "sparse_ratio": 0.75, "granularity": [1]}], None, warmup, cooldown
    )
    seen = [int((each["mask"] == 0).sum()) for each in steps(pruner, cooldown + 2)]
    curve = [1 - (1 - min(max((t - warmup) / (cooldown - warmup), 0), 1)) ** 3 for t in range(1, cooldown + 3)]
    assert seen == [floor(24 * 0.75 * part + 1e-9) for part in curve]


def test_masks_stay_behind_the_last_decision_though_scores_go_on() -> None:
    pruner = MovementPruner(network(), [{"op_names": ["0"], "sparse_ratio": 0.5}], None, 0, 2)
    seen = steps(pruner, 5, rate=0.3)
    assert all(numpy.array_equal(each["mask"], seen[1]["mask"]) for each in seen[2:])
    assert not numpy.array_equal(seen[4]["scores"], seen[1]["scores"])


def test_two_fused_ones_both_learn() -> None:
    """NNI's second hook on the optimizer's step takes the place of the first, whose scores then stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)).double()
    first = MovementPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], None, 0, 3)
    second = MovementPruner.from_compressor(
        first, [{"op_names": ["1"], "sparse_ratio": 0.5}], warmup_step=0, cooldown_begin_step=3
    )
    steps(first, 3, rate=0.01)
    for pruner, name in ((first, "0"), (second, "1")):
        key = TargetId(name, "weight")
        assert bool(pruner.masks[key].scores.detach().all())  # type: ignore[union-attr, operator]
        assert float(pruner.get_masks()[name]["weight"].mean()) == 0.5


def adam(gradient: numpy.ndarray, state: dict[str, Any]) -> numpy.ndarray:
    """What Adam (1e-2, 0.9, 0.999, 1e-8) adds."""
    state["t"] += 1
    state["m"] = 0.9 * state["m"] + 0.1 * gradient
    state["v"] = 0.999 * state["v"] + 0.001 * gradient**2
    first, second = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
    return -1e-2 * first / (numpy.sqrt(second) + 1e-8)


@pytest.mark.parametrize("scale", [0.0, 40.0])
def test_a_threshold_is_held_against_sigmoids_under_a_growing_penalty(scale: float) -> None:
    warmup, cooldown, threshold, rate, count = 1, 5, 0.505, 0.02, 7
    model = network()
    weight = model[0].weight.detach().numpy().copy()
    entries = [{"op_names": ["0"], "sparse_threshold": threshold, "granularity": [1]}]
    pruner = MovementPruner(model, entries, None, warmup, cooldown, scale)
    scores, mask = numpy.zeros((6, 4)), numpy.ones((6, 4))
    state: dict[str, Any] = {"t": 0, "m": 0.0, "v": 0.0}
    for number, found in enumerate(steps(pruner, count, rate)):
        batch = batch_of(number).numpy()
        sigmoid = 1 / (1 + numpy.exp(-scores))
        part = 1 - (1 - min(max((number - warmup) / (cooldown - warmup), 0), 1)) ** 3
        loss = ((batch @ (weight * mask).T) ** 2).sum() / 2 + scale * part * sigmoid.mean()
        assert found["loss"] == pytest.approx(loss, rel=1e-10)
        slope = (weight * mask) @ batch.T @ batch
        scores = scores + adam(slope * weight + scale * part * sigmoid * (1 - sigmoid) / scores.size, state)
        weight = weight - rate * slope * mask
        done = number + 1
        if warmup < done <= cooldown:
            due = 1 - (1 - (done - warmup) / (cooldown - warmup)) ** 3
            mask = (1 / (1 + numpy.exp(-scores)) >= threshold * due).astype(float)
            if not mask.any():
                mask.flat[scores.argmax()] = 1.0
        numpy.testing.assert_allclose(found["scores"], scores, rtol=1e-9, atol=1e-12)
        assert numpy.array_equal(found["mask"], mask), number
    assert 0 < mask.mean() < 1
