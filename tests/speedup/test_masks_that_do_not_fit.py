"""Masks that don't fit a model name themselves before it is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp.errors import RaycompError
from raycomp.speedup import ModelSpeedup

X = torch.ones(2, 3, 8, 8)


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)).eval()


@pytest.mark.parametrize(
    ("module", "masks", "told"),
    [
        ("0", {"weight": torch.ones(8)}, r"0: the mask of 'weight' has the shape \(8,\)"),
        ("0", {"_output_": torch.ones(8)}, r"0\._output_0: the mask's shape is \(8,\), and the value's \(2, 8, 6, 6\)"),
        ("0", {"_output_0": torch.ones(1, 5, 1, 1)}, r"0\._output_0: .*\(1, 5, 1, 1\)"),
        ("2", {"_input_": torch.ones(2, 8, 6, 6)}, r"2\._input_0: .*one mask for all samples"),
        (
            "0",
            {"_output_1": torch.ones(1, 8, 1, 1)},
            r"0\._output_1: masks name what the module neither takes",
        ),
        ("2", {"_input_y": torch.ones(1, 8, 1, 1)}, r"2\._input_y: masks name what"),
        ("0", {"weight": [1, 2]}, r"masks\['0'\]\['weight'\]: got \[1, 2\] \(a dense tensor"),
        ("0", {"weight": torch.ones(8, 3, 3, 3).to_sparse()}, r"masks\['0'\]\['weight'\]: got"),
        ("0", {0: torch.ones(8)}, r"masks\['0'\]: got .*\{target: tensor\}"),
        ("0", {"weight": torch.full((8, 3, 3, 3), 0.5)}, r"\['weight'\]: it has other values than 0 and 1"),
        ("0", {"weight": torch.full((8, 3, 3, 3), torch.nan)}, r"\['weight'\]: it has other values than 0 and 1"),
        ("3", {"running_mean": torch.ones(4)}, "masks name a parameter that the module lacks: 'running_mean'"),
        ("0", torch.ones(8, 3, 3, 3), r"masks\['0'\]: got a Tensor"),
        ("9", {"_output_0": torch.ones(1, 8, 1, 1)}, "masks name a module that the model lacks: '9'"),
    ],
)
def test_a_mask_that_doesn_t_fit_names_itself(module: str, masks: Any, told: str) -> None:
    with pytest.raises(RaycompError, match=told):
        ModelSpeedup(_network(), X, {module: masks})


def _mask(shape: tuple[int, ...]) -> Tensor:
    """A mask whose first entry is zero."""
    mask = torch.ones(shape)
    mask.view(-1)[0] = 0
    return mask


IMAGE = torch.ones(2, 3, 8, 8)
"""As wide and high as the convolution has channels."""


@pytest.mark.parametrize("module", ["0", "1"])
@pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 8, 8), (8, 1, 1), (8, 1), (1, 1, 8, 8, 1)])
def test_a_mask_of_another_rank_is_told_the_right_shape(module: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with pytest.raises(RaycompError, match=r"\(2, 8, 8, 8\) \(one mask for all samples, .*: \(1, 8, 1, 1\) for "):
        ModelSpeedup(model, IMAGE, {module: {"_output_": _mask(shape)}})


@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 1, 1)])
@pytest.mark.parametrize("module", ["0", "1", "2"])
def test_a_mask_of_channels_in_dimension_1_masks_these_alone(module: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    simulated = ModelSpeedup(model, IMAGE, {module: {"_output_": _mask(shape)}}).simulated
    expected = model(IMAGE)
    if module == "2":
        expected[:, 0] = 0
        torch.testing.assert_close(simulated(IMAGE), expected)
    torch.testing.assert_close(simulated(IMAGE)[:, 1:], model(IMAGE)[:, 1:])


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8)])
def test_a_mask_of_channels_that_are_last_masks_these_alone(shape: tuple[int, ...]) -> None:
    texts, model = torch.randn(2, 8, 8), nn.Sequential(nn.Linear(8, 8)).eval()
    expected = model(texts)
    expected[..., 0] = 0
    torch.testing.assert_close(ModelSpeedup(model, texts, {"0": {"_output_": _mask(shape)}}).simulated(texts), expected)
    with pytest.raises(RaycompError, match=r"\(1, 1, 8\) for its channels"):
        ModelSpeedup(model, texts, {"0": {"_output_": _mask((1, 8))}})


def test_a_mask_of_positions_is_taken() -> None:
    mask = torch.ones(1, 1, 6, 6)
    mask[..., 0] = 0
    model = _network()
    small: Any = ModelSpeedup(model, X, {"0": {"_output_": mask}}).speedup_model()
    expected: Tensor = model[3](model[2](model[1](model[0](X) * mask)))
    torch.testing.assert_close(small(X), expected)
