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


def test_a_mask_of_positions_is_taken() -> None:
    mask = torch.ones(1, 1, 6, 6)
    mask[..., 0] = 0
    model = _network()
    small: Any = ModelSpeedup(model, X, {"0": {"_output_": mask}}).speedup_model()
    expected: Tensor = model[3](model[2](model[1](model[0](X) * mask)))
    torch.testing.assert_close(small(X), expected)
