"""Masks that add, and masks that training bypassed: the simulation is what trained, and the cut model gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp.core.masks import SOFTMAX_ZERO, Masks, apply_mask
from raycomp.core.target import TargetId
from raycomp.errors import SpeedupError
from raycomp.speedup import ModelSpeedup, Plan, apply_plan
from tests.speedup.cutting import randomize_, row_masks, shapes

GONE = [1, 4, 6]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.soft, self.o = nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.soft(self.q(x)))


def keep(*shape: int) -> Tensor:
    mask = torch.ones(shape).double()
    mask[..., GONE] = 0
    return mask


def test_a_mask_is_applied_by_its_method() -> None:
    value, mask = torch.tensor([2.0, 3.0]), torch.tensor([1, 0])
    assert apply_mask(value, mask, "mul").tolist() == [2, 0]
    assert apply_mask(value, mask, "add").tolist() == [2, 3 + SOFTMAX_ZERO]
    assert apply_mask(value, mask, "bypass").tolist() == [2, 3]
    assert apply_mask(value.bfloat16(), mask, "add").dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [1, 2])
def test_a_mask_that_adds_stays_and_is_what_was_simulated(rank: int) -> None:
    torch.manual_seed(0)
    model, x = randomize_(Attention()), torch.randn(4, 6).double()
    masks = row_masks(model, {"q": GONE})
    masks["soft"] = {"_input_": keep(*[1] * (rank - 1), 8)}
    speedup = ModelSpeedup(model, x, Masks(masks, {TargetId("soft", "_input_"): "add"}))
    small: Any = speedup.speedup_model()
    scores = model.q(x)
    scores[:, GONE] = SOFTMAX_ZERO  # type: ignore[index]
    expected = model.o(scores.softmax(-1))
    assert torch.allclose(small(x), expected, atol=1e-12)
    assert torch.equal(speedup.simulated(x), small(x))
    assert small.soft(torch.zeros(8).double())[..., GONE].sum() == 0
    text = speedup.plan.to_json()
    again = apply_plan(Attention().double(), Plan.from_json(text))
    again.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(again(x), small(x))
    assert {(u.module, u.count) for u in speedup.unpruned} == {("q", 3)}
    multiplied = apply_plan(Attention().double(), Plan.from_json(text.replace(',"method":"add"', "")))
    multiplied.load_state_dict(small.state_dict(), strict=True)
    assert torch.allclose(multiplied.soft(scores), (scores * keep(8)).softmax(-1))  # type: ignore[operator]
    with pytest.raises(SpeedupError, match="can't be applied by 'pow'"):
        Plan.from_json(text.replace('"method":"add"', '"method":"pow"'))


def test_what_is_added_is_no_zero() -> None:
    """Behind a mask that adds, a masked channel still varies: the layer after it keeps its column."""
    torch.manual_seed(0)
    model, x = randomize_(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))), torch.randn(4, 5).double()
    masks = Masks({"2": {"_input_0": keep(1, 8)}}, {TargetId("2", "_input_0"): "add"})
    small: Any = ModelSpeedup(model, x, masks).speedup_model()
    assert shapes(small, "0", "2") == [(8, 5), (3, 8)]
    hidden = model[:2](x)  # type: ignore[index]
    assert torch.allclose(small(x), model[2](hidden + (1 - keep(8)) * SOFTMAX_ZERO), atol=1e-9)  # type: ignore[index]


def test_a_mask_that_adds_to_a_parameter() -> None:
    torch.manual_seed(0)
    model, x = randomize_(Attention()), torch.randn(4, 6).double()
    speedup = ModelSpeedup(model, x, Masks({"q": {"bias": keep(8)}}, {TargetId("q", "bias"): "add"}))
    small: Any = speedup.speedup_model()
    assert torch.equal(small.q.bias, model.q.bias + (1 - keep(8)) * SOFTMAX_ZERO)
    assert torch.allclose(small(x), speedup.simulated(x))


def bypassed() -> tuple[Any, Tensor, Masks]:
    torch.manual_seed(0)
    model, x = randomize_(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))), torch.randn(4, 5).double()
    masks = row_masks(model, {"0": GONE})
    masks["1"] = {"_output_0": keep(1, 8)}
    methods = {TargetId("0", "weight"): "bypass", TargetId("0", "bias"): "bypass", TargetId("1", "_output_0"): "bypass"}
    return model, x, Masks(masks, methods)  # type: ignore[arg-type]


def test_what_training_bypassed_is_not_cut_and_named() -> None:
    model, x, masks = bypassed()
    speedup = ModelSpeedup(model, x, masks)
    small: Any = speedup.speedup_model()
    assert shapes(small, "0", "2") == [(8, 5), (3, 8)]
    assert torch.equal(small(x), model(x)) and torch.equal(speedup.simulated(x), model(x))
    reason = "its mask is bypassed in training"
    assert {(u.module, u.dim, u.count, u.reason) for u in speedup.unpruned} == {
        ("0", 0, 3, reason),
        ("1", 1, 3, reason),
    }
    assert speedup.plan.surgeries == ()


def test_what_training_bypassed_is_cut_where_speedup_need_not_be_exact() -> None:
    model, x, masks = bypassed()
    speedup = ModelSpeedup(model, x, masks, exact=False)
    small: Any = speedup.speedup_model()
    assert shapes(small, "0", "2") == [(5, 5), (3, 5)]
    assert torch.equal(speedup.simulated(x), model(x))
    rest = [i for i in range(8) if i not in GONE]
    hidden = model[:2](x)[:, rest]
    assert torch.allclose(small(x), hidden @ model[2].weight[:, rest].T + model[2].bias)
    assert speedup.inexact_difference is not None and speedup.inexact_difference > 1e-3
    assert speedup.unpruned == ()


def test_masks_of_two_stages_on_one_output_both_hold() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(3, 5).double()
    first = ModelSpeedup(model, x, {"0": {"_output_0": torch.tensor([1.0, 0, 1, 1])}})
    once = first.speedup_model()
    second = ModelSpeedup(once, x, {"0": {"_output_0": torch.tensor([1.0, 1, 0, 1])}})
    twice = second.speedup_model()
    assert torch.equal(twice(x), model(x) * torch.tensor([1.0, 0, 0, 1]))
    again = apply_plan(nn.Sequential(nn.Linear(5, 4)).double(), first.plan.then(second.plan))
    again.load_state_dict(twice.state_dict(), strict=True)
    assert torch.equal(again(x), twice(x))
    with pytest.raises(SpeedupError, match="is applied by 'mul', not by 'add'"):
        ModelSpeedup(once, x, Masks({"0": {"_output_0": torch.ones(4)}}, {TargetId("0", "_output_0"): "add"}))
