from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.deploy.int8 import lower_int8, simulate_int8, sqnr_db
from raycomp.quantization import QATQuantizer
from raycomp.speedup import ModelSpeedup, cut_calibration
from tests.deploy.networks import RESIDUAL_FOLDS, ResidualNet, randomize_norms_


def train(model: nn.Module, optimizer: Any, training_step: Any, _scheduler: Any, steps: int, _epochs: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        training_step((torch.randn(16, 3, 16, 16, generator=generator), torch.randint(10, (16,))), model).backward()
        optimizer.step()


def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("granularity, activation", [("out_channel", "affine"), ("default", "symmetric")])
def test_what_training_simulated_is_what_integers_compute(granularity: str, activation: str) -> None:
    torch.manual_seed(0)
    model = randomize_norms_(ResidualNet(width=8))
    evaluator = TorchEvaluator(train, torch.optim.SGD(model.parameters(), 0.01), step)
    settings = {"weight": {"granularity": granularity}}
    for target in ("_input_", "_output_", "bias"):
        settings[target] = {"quant_dtype": "int8", "quant_scheme": activation}
    quantizer = QATQuantizer(
        model,
        [{"op_types": ["Conv2d", "Linear"], "target_settings": settings, "fuse_names": RESIDUAL_FOLDS}],
        evaluator,
    )
    _, calibration = quantizer.compress(12, None)
    x = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        trained = model.eval()(x)
    folds = quantizer.chain.folds()
    quantizer.chain.unwrap()
    assert {"_input_0", "_output_0", "weight"} <= calibration["conv1"].keys()
    with torch.no_grad():
        assert sqnr_db(trained, simulate_int8(model, calibration, folds)(x)) > 40
    lowered = lower_int8(model, calibration, folds, x, reduce_range=False)
    assert lowered.float_layers == ()
    assert sqnr_db(trained, lowered.as_module(threads=1)(x)) > 33


def test_a_grouped_transposed_convolution_is_quantized_per_channel_and_cut() -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 12, 2, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), up, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(12, 10))
    gone_before, gone = [1, 6], [0, 4, 7, 8]
    mask = torch.ones(2, 4, 6, 2, 2)
    mask[0, :, [0, 4]] = mask[1, :, [1, 2]] = 0
    masks = {"0": {"weight": torch.ones(8, 3, 3, 3), "bias": torch.ones(8)}}
    masks["2"] = {"weight": mask.reshape(8, 6, 2, 2), "bias": torch.ones(12)}
    for target in masks["0"].values():
        target[gone_before] = 0
    masks["2"]["bias"][gone] = 0
    with torch.no_grad():
        for name, targets in masks.items():
            for target, each in targets.items():
                model.get_submodule(name).get_parameter(target).mul_(each)
    settings = {
        "weight": {"granularity": "out_channel"},
        "_input_": {"quant_dtype": "uint8", "quant_scheme": "affine"},
        "_output_": {"quant_dtype": "uint8", "quant_scheme": "affine"},
    }
    entry = {"op_names": ["0", "2"], "target_names": [*settings], "target_settings": settings}
    evaluator = TorchEvaluator(train, torch.optim.SGD(model.parameters(), 0.0), step)
    quantizer = QATQuantizer(model, [entry], evaluator)
    _, calibration = quantizer.compress(4, None)
    quantizer.chain.unwrap()
    x = torch.randn(16, 3, 16, 16)
    speedup = ModelSpeedup(model, x, masks)
    small, scales = speedup.speedup_model(), cut_calibration(calibration, speedup.plan)
    assert scales["2"]["weight"]["scale"].shape == (6, 4, 1, 1)
    with torch.no_grad():
        simulated = simulate_int8(model, calibration)(x)
        assert torch.allclose(simulate_int8(small, scales)(x), simulated, atol=1e-6)
    assert sqnr_db(simulated, lower_int8(small, scales, [], x, reduce_range=False).as_module(threads=1)(x)) > 33


class Block(nn.Module):
    """Its one ReLU runs twice: once behind a fold, once behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, value: Tensor) -> Tensor:
        inner = self.relu(self.b1(self.c1(value)))
        return self.relu(self.b2(self.c2(inner)) + value)


def test_an_activations_second_call_is_in_the_integer_model() -> None:
    torch.manual_seed(0)
    model, images = Block(), torch.randn(8, 4, 8, 8)
    activation = {"quant_dtype": "uint8", "quant_scheme": "affine"}
    config = [
        {
            "op_types": ["Conv2d"],
            "target_names": ["_input_", "weight", "_output_"],
            "target_settings": {"_input_": activation, "_output_": activation, "weight": {"quant_dtype": "int8"}},
            "fuse_names": [("c1", "b1", "relu"), ("c2", "b2")],
        },
    ]
    quantizer = QATQuantizer(model, config)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with quantizer.chain.run([optimizer]):
        for _ in range(3):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        simulated = model.eval()(images)
        calibration, folds = quantizer.get_calibration_config(), quantizer.folds()
        quantizer.unwrap_model()
        expected = model.eval()(images)
        real = lower_int8(model, calibration, folds, images).as_module()(images)
    assert simulated.min() == real.min() == 0
    assert sqnr_db(simulated, real) > 30
    assert sqnr_db(expected, real) > 15


def test_a_grouped_transposed_convolution_by_output_channel_is_lowered_with_its_rounding() -> None:
    """No integer kernel takes its scales: the weight keeps the numbers of its grid, as floats."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1)), torch.randn(2, 4, 5, 5)
    weight = {"quant_dtype": "int3", "granularity": "out_channel"}
    config = [
        {"op_names": ["0"], "target_names": ["weight"], **weight},
        {"op_names": ["1"], "target_names": ["_input_", "weight", "_output_"]},
    ]
    quantizer = QATQuantizer(model, config)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with quantizer.chain.run([optimizer]):
        for _ in range(3):
            model(images).sum().backward()
            optimizer.step()
    with torch.no_grad():
        simulated, calibration = model.eval()(images), quantizer.get_calibration_config()
        quantizer.unwrap_model()
        real = lower_int8(model, calibration, [], images, reduce_range=False).as_module()(images)
        dense = model(images)
    assert sqnr_db(simulated, real) > 35 > 25 > sqnr_db(dense, real)
