"""Plans: what they refuse, and calibration that follows them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycomp.errors import SpeedupError
from raycomp.speedup import ModelSpeedup, Plan, apply_plan, cut_calibration, verify
from raycomp.speedup.surgery.plan import Block, BlockCut, Cut, Surgery
from tests.speedup.cutting import row_masks


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3))


def plan(gone: list[int]) -> Plan:
    model = net()
    speedup = ModelSpeedup(model, torch.randn(2, 3, 8, 8), row_masks(model, {"0": gone}))
    speedup.speedup_model()
    return speedup.plan


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(SpeedupError, match="the plan expects 8 in dimension 0, and the tensor has the shape \\(6, 3"):
        apply_plan(net(6), plan([1, 2]))
    with pytest.raises(SpeedupError, match="a parameter that the model lacks"):
        apply_plan(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU()), plan([1, 2]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "keep": [], "surgeries": [{}]}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(SpeedupError):
        Plan.from_json(text)


def test_a_plan_names_registered_operators_only() -> None:
    text = (
        '{"format":1,"keep":[],"surgeries":[{"cuts":[],"block_cuts":[],"attributes":[],"biases":[],"value_masks":[],'
        '"activations":[],"graph":{"constants":{},"nodes":[{"op":"call_function","name":"x","target":"os.system",'
        '"args":["true"],"kwargs":{}}]}}]}'
    )
    with pytest.raises(SpeedupError, match=r"os\.system"):
        apply_plan(net(), Plan.from_json(text))


def test_scales_of_cut_channels_go() -> None:
    scale = torch.arange(1.0, 9.0).reshape(8, 1, 1, 1)
    activation = torch.arange(1.0, 9.0).reshape(1, 8, 1, 1)
    calibration = {
        "0": {
            "weight": {"scale": scale, "zero_point": torch.zeros(8, 1, 1, 1), "axis": 0, "quant_dtype": "int8"},
            "_input_0": {"scale": torch.tensor(0.5), "axis": None},
            "_output_0": {"scale": activation, "axis": 1},
        },
        "2": {"weight": {"scale": torch.arange(1.0, 5.0).reshape(4, 1, 1, 1), "axis": 0}},
    }
    cut = cut_calibration(calibration, plan([1, 2, 7]))
    assert cut["0"]["weight"]["scale"].flatten().tolist() == [1, 4, 5, 6, 7]
    assert cut["0"]["weight"]["zero_point"].shape == (5, 1, 1, 1)
    assert cut["0"]["_output_0"]["scale"].flatten().tolist() == [1, 4, 5, 6, 7]
    assert cut["0"]["_input_0"]["scale"].item() == 0.5
    assert cut["2"]["weight"]["scale"].flatten().tolist() == [1, 2, 3, 4]
    assert calibration["0"]["weight"]["scale"] is scale


def test_scales_follow_the_cuts_of_their_own_dimension() -> None:
    rows, columns = Cut("a.weight", 0, 3, (1, 2)), Cut("a.weight", 1, 3, (0, 1))
    shapes = {0: (3, 1), 1: (1, 3)}
    for axis, expected in ((0, [2, 3]), (1, [1, 2])):
        scale = torch.tensor([1.0, 2.0, 3.0]).reshape(shapes[axis])
        calibration = {"a": {"weight": {"scale": scale, "zero_point": torch.zeros(1, 1), "axis": axis}}}
        cut = cut_calibration(calibration, Plan((Surgery(cuts=(rows, columns)),)))
        assert cut["a"]["weight"]["scale"].flatten().tolist() == expected
        assert cut["a"]["weight"]["zero_point"].shape == (1, 1)


def test_scales_of_a_grouped_weight_follow_its_blocks() -> None:
    blocks = BlockCut("a.weight", (4, 2), (Block((1,), (0,)), Block((2, 3), (1,))))
    calibration = {"a": {"weight": {"scale": torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1), "axis": 0}}}
    cut = cut_calibration(calibration, Plan((Surgery(block_cuts=(blocks,)),)))
    assert cut["a"]["weight"]["scale"].tolist() == [[2], [3], [4]]


def test_scales_of_a_grouped_transposed_weight_follow_rows_and_columns_of_its_blocks() -> None:
    """Two inputs and three outputs of each of two groups; every output channel has one scale, in all rows."""
    scale = torch.tensor([[1.0, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]])
    blocks = BlockCut("a.weight", (4, 3), (Block((1,), (0, 2)), Block((2, 3), (1, 2))))
    calibration = {"a": {"weight": {"scale": scale, "zero_point": torch.zeros(1, 1)}}}
    cut = cut_calibration(calibration, Plan((Surgery(block_cuts=(blocks,)),)))
    assert cut["a"]["weight"]["scale"].tolist() == [[1, 3], [5, 6], [5, 6]]
    assert cut["a"]["weight"]["zero_point"].shape == (1, 1)


def test_masks_that_do_not_fit_are_refused() -> None:
    for masks, message in (
        ({"nowhere": {"weight": torch.ones(1)}}, "module that the model lacks: 'nowhere'"),
        ({"0": {"scale": torch.ones(1)}}, "parameter that the module lacks: 'scale'"),
        ({"0": {"weight": torch.ones(8)}}, "the mask of 'weight' has the shape"),
    ):
        with pytest.raises(SpeedupError, match=message):
            ModelSpeedup(net(), torch.randn(2, 3, 8, 8), masks)


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(SpeedupError, match=r"Branching cannot be exported"):
        ModelSpeedup(Branching(), torch.randn(2, 3), {}).speedup_model()


def test_verification_tells_differences() -> None:
    left, right = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    nn.init.eye_(left.weight)
    nn.init.eye_(right.weight)
    right.weight.data[1, 1] = 1.5
    example = torch.tensor([[0.0, 4.0], [-2.0, 0.0]])
    found = verify(left, right, [example], batch_sizes=[2])
    assert (found.max_abs_diff, found.output_range, found.relative, found.passed) == (2.0, 6.0, 2 / 6, False)
    assert verify(left, left, [example]).passed
    with pytest.raises(SpeedupError, match="other shapes"):
        verify(left, nn.Linear(2, 3), [example])
    right.weight.data[0, 0] = float("nan")
    assert not verify(left, right, [example]).passed
    single = nn.Linear(2, 1)
    assert verify(single, single, [example], batch_sizes=[1]).passed


def test_modes_and_gradients_stay() -> None:
    model = net().train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    small = ModelSpeedup(model, torch.randn(2, 3, 8, 8), row_masks(model, {"0": [1]})).speedup_model()
    assert (small.training, small[0].training, small[2].training) == (True, True, False)
    assert (small[0].weight.requires_grad, small[0].bias.requires_grad) == (False, True)
    assert model.training
