"""Output channels that are not a weight's first dimension: transposed convolutions, transformers' Conv1D."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raycomp.core.masks import Masks
from raycomp.pruning import L1NormPruner
from raycomp.speedup import ModelSpeedup, TracedModel, align_followers, auto_set_dependency_group_ids, dependencies
from tests.speedup.cutting import randomize_, shapes

IMAGES = torch.randn(2, 3, 8, 8)


class Decoder(nn.Module):
    """The outputs of a transposed convolution, of one of several groups by default, are added to a convolution's."""

    def __init__(self, inputs: int = 4, outputs: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, inputs, 3, padding=1)
        self.up, self.skip = nn.ConvTranspose2d(inputs, outputs, 2, 2, groups=groups), nn.Conv2d(3, outputs, 1)
        self.norm, self.out = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.a(x).relu())
        return self.out(self.norm(y + nn.functional.interpolate(self.skip(x), scale_factor=2)).relu())


@pytest.mark.parametrize(("inputs", "groups", "blocks"), [(4, 1, 1), (6, 1, 1), (8, 2, 2)])
def test_output_channels_of_a_transposed_convolution_form_groups(inputs: int, groups: int, blocks: int) -> None:
    found = dependencies(TracedModel.of(Decoder(inputs, 8, groups), IMAGES), ["up", "skip"])
    (group,) = found.groups
    assert (group.modules, group.blocks, group.unit, group.obstacle) == (("up", "skip"), blocks, 1, None)
    assert found.followers == {"up": ("up.bias", "norm.weight", "norm.bias"), "skip": ("skip.bias",)}


def test_a_depthwise_transposed_convolution_goes_with_its_inputs() -> None:
    (group,) = dependencies(TracedModel.of(Decoder(8, 8, groups=8), IMAGES), ["a", "up", "skip"]).groups
    assert (group.modules, group.blocks, group.unit, group.obstacle) == (("a", "up", "skip"), 1, 1, None)
    first, second = dependencies(TracedModel.of(Decoder(4, 8, groups=4), IMAGES), ["a", "up"]).groups
    assert (first.modules, first.unit, second.modules, second.unit) == (("a",), 1, ("up",), 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_config_list_prunes_output_channels_and_speedup_cuts_them(groups: int) -> None:
    torch.manual_seed(0)
    model: Any = randomize_(Decoder(4, 8, groups))
    up = model.up.weight.detach().reshape(groups, 4 // groups, 8 // groups, 4).abs().sum((1, 3))
    metric = up + model.skip.weight.detach().abs().flatten(1).sum(1).reshape(groups, -1)
    least = metric.argsort(dim=1)[:, : 4 // groups] + torch.arange(groups)[:, None] * (8 // groups)
    expected = sorted(least.flatten().tolist())
    config = auto_set_dependency_group_ids(model, [{"op_names": ["up", "skip"], "sparse_ratio": 0.5}], IMAGES.double())
    pruner = L1NormPruner(model, align_followers(model, config, IMAGES.double()))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    kept = masks["up"]["weight"].reshape(groups, 4 // groups, 8 // groups, 4).amax((1, 3)).flatten()
    for mask in (kept, masks["up"]["bias"], masks["skip"]["bias"], masks["norm"]["bias"]):
        assert (mask == 0).nonzero().flatten().tolist() == expected
    small: Any = ModelSpeedup(model, IMAGES.double(), masks).speedup_model()
    assert shapes(small, "up", "skip") == [(4, 4 // groups, 2, 2), (4, 3, 1, 1)]
    x = torch.randn(3, 3, 8, 8).double()
    assert torch.allclose(small(x), model(x), atol=1e-10)


@pytest.mark.parametrize(("groups", "runs"), [(1, [-1, 4, -1, -1]), (2, [2, 4, -1, -1]), (4, None)])
def test_runs_of_channels_of_a_transposed_convolution(groups: int, runs: list[int] | None) -> None:
    """A group norm asks for runs of 4 output channels; with 4 groups, a group of the weight has 2 alone."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 2, groups=groups), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
    (entry,) = auto_set_dependency_group_ids(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], torch.randn(2, 4, 5, 5))
    assert entry.get("target_settings", {}).get("weight", {}).get("granularity") == runs


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(16, 6), Conv1D(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_a_transformers_conv_goes_by_its_outputs() -> None:
    torch.manual_seed(0)
    model, x = Mlp().double().eval(), torch.randn(2, 5, 6).double()
    found = dependencies(TracedModel.of(model, x), ["up", "down"])
    up, down = found.groups
    assert (up.modules, up.unit, up.obstacle) == (("up",), 1, None)
    assert (down.modules, down.unit, down.obstacle) == (("down",), 1, "it is a dimension of the model's input")
    assert found.followers["up"] == ("up.bias",)
    pruner = L1NormPruner(
        model, align_followers(model, [{"op_names": ["up"], "sparse_ratio": 0.5, "target_names": ["weight"]}], x)
    )
    _, masks = pruner.compress()
    least = model.up.weight.abs().sum(0).argsort()[:8].sort().values.tolist()
    assert (masks["up"]["bias"] == 0).nonzero().flatten().tolist() == least
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, x, Masks(masks))
    small: Any = speedup.speedup_model()
    assert shapes(small, "up", "down") == [(6, 8), (8, 6)] and (small.up.nf, small.down.nf) == (8, 6)
    assert isinstance(small, Mlp) and speedup.unpruned == ()
    assert torch.allclose(small(x), model(x), atol=1e-10)
