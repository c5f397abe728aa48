"""Masks that follow other masks: chains, other modules, other pruners, inputs and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raycomp.core.chain import Chain
from raycomp.errors import ConfigError
from raycomp.pruning import AGPPruner, L1NormPruner
from raycomp.quantization import QATQuantizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 4)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([3.0, 1, 4, 2]).view(4, 1, 1, 1).expand(4, 1, 3, 3))
            self.norm.bias.fill_(5.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.relu(self.norm(self.conv(images))).mean((2, 3)))


KEPT = [1, 0, 1, 0]
CONV = {"op_names": ["conv"], "sparse_ratio": 0.5}


def following(name: str, source: str, **keys: Any) -> dict[str, Any]:
    return {"op_names": [name], "align": {"module_name": source, "target_name": "weight", "dims": [0]}, **keys}


def refused(*config_list: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        L1NormPruner(Net(), list(config_list))
    return str(raised.value)


def test_a_batch_norm_follows_its_convolution_and_its_bias_the_batch_norm() -> None:
    # NNI's own example, in any order: the norm's bias aligns to the norm's weight, which is aligned itself.
    entries = [
        {"op_names": ["norm"], "target_names": ["bias"], "align": {"target_name": "weight"}},
        following("norm", "conv", target_names=["weight"]),
        CONV,
    ]
    model = Net()
    pruner = L1NormPruner(model, entries)
    masks = pruner.compress()[1]
    assert masks["conv"]["bias"].tolist() == KEPT
    assert masks["norm"]["weight"].tolist() == KEPT
    assert masks["norm"]["bias"].tolist() == KEPT
    output = model.norm(model.conv(torch.randn(2, 1, 4, 4)))
    assert output.abs().amax((0, 2, 3))[[1, 3]].tolist() == [0, 0]
    pruner.unwrap_model()
    assert model.norm.bias.tolist() == [5, 0, 5, 0]


def test_an_entry_without_target_names_aligns_weight_and_bias() -> None:
    masks = L1NormPruner(Net(), [CONV, following("norm", "conv")]).compress()[1]
    assert masks["norm"]["weight"].tolist() == masks["norm"]["bias"].tolist() == KEPT


def test_a_target_can_follow_a_pruner_fused_before_through_its_whole_schedule() -> None:
    model = Net()
    leader = AGPPruner(L1NormPruner(model, [CONV]), 1, 2)
    follower = L1NormPruner.from_compressor(leader.pruner, [following("norm", "conv")])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    seen = []
    with leader.chain.run([optimizer]):
        for _ in range(2):
            optimizer.step()
            seen.append(follower.get_masks()["norm"]["weight"].tolist())
    # 4 × 0.5 × 7/8 is one channel, then two.
    assert seen == [[1, 0, 1, 1], KEPT]


@pytest.mark.parametrize("size", [4, 6])
def test_outputs_of_a_convolution_are_masked_by_channel(size: int) -> None:
    # With as many columns as channels, a mask in the wrong dimension would go unnoticed.
    entries = [CONV, following("relu", "conv", target_names=["_output_"])]
    model = Net()
    pruner = L1NormPruner(model, entries)
    pruner.compress()
    images = torch.randn(3, 1, size, size)
    values: list[Tensor] = []
    model.relu.register_forward_hook(lambda module, args, output: values.append(output))
    model(images)
    assert [bool(part) for part in values[0].abs().amax((0, 2, 3))] == [bool(part) for part in KEPT]
    assert pruner.get_masks()["relu"]["_output_0"].tolist() == [[[[part]] for part in KEPT]]


def test_a_convolutions_own_output_mask_has_its_rank_at_once() -> None:
    entries = [CONV, following("conv", "conv", target_names=["_output_"])]
    masks = L1NormPruner(Net(), entries).compress()[1]
    assert masks["conv"]["_output_0"].shape == (1, 4, 1, 1)


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4)])
def test_a_linear_layers_activations_are_masked_in_the_last_dimension(shape: tuple[int, ...]) -> None:
    entries = [CONV, following("fc", "conv", target_names=["_input_"])]
    model = Net()
    L1NormPruner(model, entries).compress()
    with torch.no_grad():
        model.fc.weight.copy_(torch.eye(4))
        model.fc.bias.zero_()
    assert torch.equal(model.fc(torch.ones(shape)), torch.tensor(KEPT).expand(shape).float())


def test_add_makes_a_softmax_ignore_what_is_masked() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(4, 4)
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, value: Tensor) -> Tensor:
            return self.softmax(self.scores(value))

    model = Attention()
    with torch.no_grad():
        model.scores.weight.copy_(torch.tensor([3.0, 1, 4, 2]).view(4, 1).expand(4, 4))
        model.scores.bias.zero_()
    align = {"module_name": "scores", "target_name": "weight", "dims": [0]}
    entries = [
        {"op_names": ["scores"], "sparse_ratio": 0.5, "target_names": ["weight"]},
        {"op_names": ["softmax"], "target_names": ["_input_"], "align": align, "apply_method": "add"},
    ]
    pruner = L1NormPruner(model, entries)
    pruner.compress()
    # Scores 12 and 16 remain; a 0 in place of the masked ones would take a share of the softmax.
    expected = torch.softmax(torch.tensor([12.0, 16.0]), 0)
    found = model(torch.ones(1, 4))[0]
    assert torch.allclose(found[[0, 2]], expected)
    assert found[[1, 3]].tolist() == [0, 0]


def test_a_circle_is_refused() -> None:
    text = refused(following("norm", "fc", target_names=["weight"]), following("fc", "norm", target_names=["weight"]))
    assert "config_list[0].align: norm.weight follows itself in a circle" in text
    assert "config_list[1].align: fc.weight follows itself in a circle" in text


def test_what_has_no_mask_can_not_be_followed() -> None:
    text = refused(CONV, following("norm", "fc"))
    assert "config_list[1].align: norm.weight follows fc.weight, which has no mask" in text


def test_a_follower_must_have_as_many_entries() -> None:
    text = refused(CONV, following("fc", "conv", target_names=["weight"]))
    assert "fc.weight of shape (4, 4) can't follow 4 entries of conv.weight" in text
    entry = {"op_names": ["norm"], "align": {"module_name": "conv", "target_name": "weight", "dims": [4]}}
    assert "dims [4] are not dimensions of conv.weight, of shape (4, 1, 3, 3)" in refused(CONV, entry)


def test_what_follows_an_activation_of_known_shape_is_no_problem() -> None:
    """Its mask has entries for channels alone, of however many samples the example has."""
    output = following("relu", "conv", target_names=["_output_"])
    after = {"op_names": ["norm"], "target_names": ["_output_"]}
    after["align"] = {"module_name": "relu", "target_name": "_output_0", "dims": [1]}
    after_all = {**after, "op_names": ["fc"], "target_names": ["_input_"]}
    after_all["align"] = {"module_name": "relu", "target_name": "_output_0"}
    masks = L1NormPruner(Chain(Net(), torch.ones(3, 1, 9, 9)), [CONV, output, after, after_all]).compress()[1]
    assert masks["norm"]["_output_0"].flatten().tolist() == KEPT


def test_the_dimension_that_is_followed_counts() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([3.0, 1, 4, 2]).expand(6, 4))
    inputs = {"op_names": ["1"], "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": "in_channel"}
    align = {"module_name": "1", "target_name": "weight", "dims": [1]}
    bias = {"op_names": ["0"], "target_names": ["bias"], "align": align}
    assert L1NormPruner(model, [inputs, bias]).compress()[1]["0"]["bias"].tolist() == KEPT


def test_what_follows_has_its_own_shape() -> None:
    class Planes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 4)
            self.norm = nn.LayerNorm([2, 2])
            with torch.no_grad():
                self.fc.weight.copy_(torch.tensor([[3.0], [1], [4], [2]]))

        def forward(self, value: Tensor) -> Tensor:
            return self.norm(self.fc(value).reshape(-1, 2, 2))

    scale = following("norm", "fc", target_names=["weight"])
    masks = L1NormPruner(Planes(), [{"op_names": ["fc"], "sparse_ratio": 0.5}, scale]).compress()[1]
    assert masks["norm"]["weight"].tolist() == [[1, 0], [1, 0]]


def test_a_quantizer_between_does_not_lead() -> None:
    pruner = L1NormPruner(Net(), [CONV])
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_names": ["fc"], "target_names": ["weight"]}])
    follower = L1NormPruner.from_compressor(quantizer, [following("norm", "conv", target_names=["weight"])])
    follower.chain.begin()
    assert follower.get_masks()["norm"]["weight"].tolist() == KEPT


def test_a_moving_average_of_the_model_made_at_the_beginning_is_masked() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    entries = [
        {"op_names": ["0"], "sparse_ratio": 0.5},
        {"op_names": ["1"], "target_names": ["_output_0"], "align": {"module_name": "0", "target_name": "weight"}},
    ]
    pruner = L1NormPruner(model, entries)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    averaged.update_parameters(model)
    pruner.compress()
    averaged.update_parameters(model)
    value = torch.randn(3, 4)
    assert torch.equal(averaged(value), model(value))
    assert int((averaged.module[1](torch.ones(1, 6)) == 0).sum()) == 3  # type: ignore[union-attr, operator, index]


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.63)])
def test_a_mean_of_masks_masks_what_the_last_of_them_does(average: Any) -> None:
    """With `use_buffers`, torch averages the masks, too: 0.37 of a weight is neither kept nor masked."""
    model = nn.Sequential(nn.Linear(4, 8))
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    averaged.update_parameters(model)
    pruner.compress()
    averaged.update_parameters(model)
    averaged(torch.ones(1, 4))
    found = {name.removeprefix("module."): value for name, value in averaged.named_buffers() if "mask" in name}
    masks = {name: value for name, value in model.named_buffers() if "mask" in name}
    assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)
    assert any(0 < value.mean() < 1 for value in masks.values())
