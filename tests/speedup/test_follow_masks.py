"""Masks that follow the surgery, in both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raycomp.core.masks import Masks
from raycomp.core.target import TargetId
from raycomp.speedup import ModelSpeedup, Plan, apply_plan, remaining_masks, restored_mask, with_value_masks
from raycomp.speedup.surgery.plan import Block, BlockCut, Cut, Surgery
from tests.speedup.cutting import randomize_, row_masks


def test_what_was_cut_counts_as_masked() -> None:
    plan = Plan(
        (
            Surgery(cuts=(Cut("a.weight", 0, 4, (0, 2, 3)), Cut("a.weight", 1, 2, (1,)))),
            Surgery(cuts=(Cut("a.weight", 0, 3, (0, 2)), Cut("b.weight", 0, 9, (1,)))),
        )
    )
    mask = restored_mask(torch.tensor([[0.0], [1.0]]), "a.weight", plan)
    assert mask.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1]]


def test_a_grouped_weight_is_spread_group_by_group() -> None:
    blocks = (Block((0,), (1,)), Block((2,), (0,)))
    plan = Plan((Surgery(block_cuts=(BlockCut("a.weight", (4, 2), blocks),)),))
    assert restored_mask(torch.ones(2, 1), "a.weight", plan).tolist() == [[0, 1], [0, 0], [1, 0], [0, 0]]


def test_a_mask_of_another_tensor_stays() -> None:
    plan = Plan((Surgery(cuts=(Cut("a.weight", 0, 4, (0,)),)),))
    assert restored_mask(torch.ones(3), "b.weight", plan).tolist() == [1, 1, 1]


def grouped() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )


def masked_network() -> tuple[nn.Module, Masks]:
    """Of each group an input goes, and another one that differs from group to group; of the first group all outputs."""
    torch.manual_seed(0)
    model = randomize_(grouped())
    masks = row_masks(model, {"0": [0, 1, 2, 5, 7], "2": [0, 1, 2, 3, 6, 9, 10]})
    fine = torch.ones(4, 12, 1, 1)
    fine[1, 11] = 0
    masks["4"] = {"weight": fine, "bias": torch.ones(4)}
    masks["3"] = {"_output_0": torch.ones(1, 12, 1, 1)}
    masks["3"]["_output_0"][:, 4] = 0
    masks["1"] = {"_output_0": torch.tensor([0, 0, 0, 0, 1, 0, 1, 0]).reshape(1, 8, 1, 1)}
    return model, Masks(masks, {TargetId("1", "_output_0"): "bypass"})


def test_what_a_cut_leaves_masked_goes_on_and_comes_back() -> None:
    model, masks = masked_network()
    speedup = ModelSpeedup(model, torch.randn(2, 3, 6, 6).double(), masks)
    small: Any = speedup.speedup_model()
    assert small[2].groups == 3 and any(surgery.block_cuts for surgery in speedup.plan.surgeries)
    remaining = remaining_masks(masks, speedup.plan)
    names = [(module, target) for module in ("0", "2", "4") for target in ("weight", "bias")]
    for module, target in names:
        parameter = getattr(small.get_submodule(module), target)
        mask = remaining.get(module, {}).get(target)
        assert mask is None or (mask.shape == parameter.shape and not parameter[mask == 0].any())
        name = f"{module}.{target}"
        present = torch.ones_like(parameter) if mask is None else mask
        cut = restored_mask(torch.ones_like(parameter), name, speedup.plan)
        assert torch.equal(restored_mask(present, name, speedup.plan), (masks[module][target] * cut).to(present))
    assert "bias" not in remaining["4"] and remaining["4"]["weight"].sum() == remaining["4"]["weight"].numel() - 1
    assert "3" not in remaining
    again = ModelSpeedup(small, torch.randn(2, 3, 6, 6).double(), remaining)
    assert torch.equal(again.simulated(x := torch.randn(3, 3, 6, 6).double()), small(x))
    assert remaining["1"]["_output_0"].flatten().tolist() == [0, 1, 1]  # of the channels 3, 4 and 6
    assert remaining.method("1", "_output_0") == "bypass"


def test_without_a_cut_all_that_is_masked_remains() -> None:
    _, masks = masked_network()
    remaining = remaining_masks(masks, Plan())
    assert set(remaining) == {"0", "1", "2", "3", "4"} and set(remaining["4"]) == {"weight"}
    assert torch.equal(remaining["3"]["_output_0"], masks["3"]["_output_0"])


def test_a_model_that_is_not_cut_keeps_its_masks() -> None:
    model, masks = masked_network()
    masks.put(TargetId("0", "_input_0"), torch.ones(1, 3, 1, 1))
    masks.put(TargetId("4", "_input_"), torch.tensor([1.0] * 11 + [0]).reshape(1, 12, 1, 1), "add")
    x = torch.randn(2, 3, 6, 6).double()
    simulated = ModelSpeedup(model, x, masks).simulated
    masked, plan = with_value_masks(model, masks)
    assert torch.equal(masked(x), simulated(x)) and not torch.allclose(masked(x), model(x))
    assert not masked[0].weight[masks["0"]["weight"] == 0].any()  # type: ignore[index, union-attr]
    kept = plan.surgeries[0].value_masks
    assert [(each.module, each.target, each.method) for each in kept] == [
        ("3", "_output_0", "mul"),
        ("4", "_input_0", "add"),
    ]
    again = apply_plan(grouped().double(), Plan.from_json(plan.to_json()))
    again.load_state_dict(masked.state_dict(), strict=True)
    assert torch.equal(again(x), masked(x))
    assert set(remaining_masks(masks, plan)) == {"0", "1", "2", "4"}
    assert set(remaining_masks(masks, plan)["4"]) == {"weight"}
    assert with_value_masks(model, row_masks(model, {"0": [1]}))[1] == Plan()
