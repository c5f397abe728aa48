from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from raycomp.deploy.int8 import Int8Model, foreseen_hindrances, lower_int8, simulate_int8, sqnr_db
from raycomp.deploy.measure import count_parameters
from raycomp.errors import RaycompError, SpeedupError
from tests.deploy.networks import RESIDUAL_FOLDS, Calibration, ResidualNet, calibrate, entry, randomize_norms_

RESIDUAL_LAYERS = ["stem", "conv1", "conv2", "shortcut", "fc"]


def integer_operators(model: Int8Model) -> int:
    """How many operators compute with 8-bit integers."""
    kernels = ("QLinear", "QGemm", "MatMulInteger")
    return sum(count for name, count in model.execution.operators.items() if name.startswith(kernels))


def constants(model: Int8Model) -> dict[str, np.ndarray[Any, Any]]:
    graph = onnx.load_from_string(model.onnx).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def run_both(
    model: nn.Module,
    calibration: Calibration,
    folds: Sequence[Sequence[str]],
    x: Tensor,
    reduce_range: bool = False,
) -> tuple[Int8Model, Tensor, Tensor]:
    lowered = lower_int8(model, calibration, folds, x[:2], reduce_range=reduce_range)
    with torch.no_grad():
        simulated = simulate_int8(model, calibration, folds, reduce_range=reduce_range)(x)
    # What the graph lets foresee is what ONNX Runtime does.
    assert lowered.hindrances == lowered.float_causes
    return lowered, simulated, lowered.as_module(threads=1)(x)


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomize_norms_(ResidualNet()), torch.randn(16, 3, 32, 32)


@pytest.mark.parametrize(
    "activation, per_channel, reduce_range",
    [
        (("int8", "symmetric"), False, False),
        (("int8", "symmetric"), True, True),
        (("uint8", "affine"), False, True),
        (("uint8", "affine"), True, False),
    ],
)
def test_a_residual_cnn_runs_on_integer_kernels_and_agrees_with_its_simulation(
    residual: tuple[nn.Module, Tensor], activation: tuple[str, str], per_channel: bool, reduce_range: bool
) -> None:
    model, x = residual
    calibration = calibrate(
        model, x, RESIDUAL_LAYERS, folds=RESIDUAL_FOLDS, activation=activation, per_channel=per_channel
    )
    lowered, simulated, real = run_both(model, calibration, RESIDUAL_FOLDS, x, reduce_range)
    assert lowered.execution.operators["QLinearConv"] == 4
    assert lowered.execution.operators["QGemm"] == 1
    assert "Conv" not in lowered.execution.operators and "FusedConv" not in lowered.execution.operators
    assert lowered.float_layers == ()
    assert lowered.signature.dynamic_batch and lowered.reduce_range is reduce_range
    assert sqnr_db(simulated, real) > 35
    with torch.no_grad():
        assert sqnr_db(model(x), simulated) > 25


CASES: dict[str, tuple[nn.Module, tuple[int, ...], list[str], list[tuple[str, ...]]]] = {
    "mlp": (nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10)), (20,), ["0", "2"], []),
    "no bias": (nn.Sequential(nn.Linear(20, 8, bias=False)), (20,), ["0"], []),
    "linear on sequences": (nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 9)), (5, 20), ["0", "2"], []),
    "linear, norm, relu": (
        nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
        (20,),
        ["0", "3"],
        [("0", "1", "2")],
    ),
    "conv1d, grouped": (
        nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=2)),
        (4, 20),
        ["0", "3"],
        [("0", "1")],
    ),
    "conv3d": (
        nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 3)),
        (2, 6, 6, 6),
        ["0", "3"],
        [("0", "1", "2")],
    ),
    "depthwise, relu6": (
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1)),
        (8, 9, 9),
        ["0", "3"],
        [("0", "1")],
    ),
    "pooling and activations": (
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
        (4, 8, 8),
        ["0", "1", "2", "3", "5"],
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_run_on_integer_kernels(case: str) -> None:
    torch.manual_seed(1)
    template, shape, layers, folds = CASES[case]
    model = randomize_norms_(copy.deepcopy(template))
    x = torch.randn(16, *shape)
    calibration = calibrate(model, x, layers, folds=folds, per_channel=True)
    lowered, simulated, real = run_both(model, calibration, folds, x)
    assert lowered.float_layers == ()
    assert integer_operators(lowered) >= sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in model)
    assert sqnr_db(simulated, real) > 40


@pytest.mark.parametrize(
    "model, layers, folds",
    [
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.ReLU()), ["0"], []),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)), ["0", "2"], [("0", "1")]),
    ],
    ids=["transposed convolution", "batch norm"],
)
def test_what_has_no_integer_kernel_is_computed_in_float_and_named(
    model: nn.Module, layers: list[str], folds: list[tuple[str, ...]]
) -> None:
    torch.manual_seed(1)
    model = randomize_norms_(copy.deepcopy(model))
    x = torch.randn(8, 4, 6, 6)
    lowered, simulated, real = run_both(model, calibrate(model, x, layers, folds=folds), folds, x)
    assert lowered.float_layers == ("0",)
    assert "no integer kernel for" in lowered.float_causes["0"]
    assert sqnr_db(simulated, real) > 40


def test_a_recurrent_layer_s_integer_weights_are_computed_in_float_and_named() -> None:
    model = nn.LSTM(4, 3, batch_first=True)
    weights = {name: entry(-torch.ones(()), torch.ones(())) for name in ("weight_ih_l0", "weight_hh_l0")}
    lowered = lower_int8(nn.Sequential(model), {"0": weights}, [], torch.randn(2, 5, 4))
    cause = "ONNX Runtime has no integer kernel for LSTM: leave it out of the quantizer"
    assert (lowered.layers, lowered.float_causes, lowered.hindrances) == (("0",), {"0": cause}, {"0": cause})


def test_a_convolution_without_output_quantizer_is_named(residual: tuple[nn.Module, Tensor]) -> None:
    model, x = residual
    calibration = calibrate(model, x, RESIDUAL_LAYERS, folds=RESIDUAL_FOLDS, outputs=False, per_channel=True)
    lowered, simulated, real = run_both(model, calibration, RESIDUAL_FOLDS, x)
    # The stem ends in conv1's (and the shortcut's) input quantizer, conv1 in conv2's; the sum's two operands are float.
    assert lowered.float_layers == ("conv2", "shortcut")
    assert set(lowered.float_causes.values()) == {"its output has no scale: add `_output_` to its target_names"}
    blank = {name: {key: entry(-torch.ones(()), torch.ones(())) for key in calibration[name]} for name in calibration}
    assert foreseen_hindrances(model, blank, RESIDUAL_FOLDS, x) == lowered.float_causes
    assert lowered.execution.operators["QLinearConv"] == 2
    assert sqnr_db(simulated, real) > 40


def test_the_file_holds_the_given_scales_to_the_bit_and_the_folded_weights(residual: tuple[nn.Module, Tensor]) -> None:
    model, x = residual
    calibration = calibrate(
        model, x, RESIDUAL_LAYERS, folds=RESIDUAL_FOLDS, activation=("int8", "affine"), per_channel=True
    )
    stored = constants(lower_int8(model, calibration, RESIDUAL_FOLDS, x[:2], reduce_range=False))
    for layer in RESIDUAL_LAYERS:
        for target, given in calibration[layer].items():
            # The shortcut reads what conv1 reads, on the same grid: one quantizer serves both.
            name = f"{layer}.{target}".replace("shortcut._input_0", "conv1._input_0")
            scale, zero_point = given["scale"].numpy(), given["zero_point"].numpy()
            assert stored[f"{name}_scale"].tobytes() == scale.tobytes()
            shift = 0 if target == "weight" else 128  # activations are stored unsigned
            expected = (zero_point + shift).astype(np.int8 if target == "weight" else np.uint8)
            assert stored[f"{name}_zero_point"].tobytes() == expected.tobytes()

    check_folded_weights(model, calibration, stored)


def check_folded_weights(model: nn.Module, calibration: Calibration, stored: dict[str, Any]) -> None:
    conv: Any = model.conv1
    norm: Any = model.bn1
    factor = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach()
    folded = conv.weight.detach().double() * factor.view(-1, 1, 1, 1)
    scale = calibration["conv1"]["weight"]["scale"].double()
    exact = (folded / scale).numpy()
    assert stored["conv1.weight_quantized"].dtype == np.int8
    assert np.abs(stored["conv1.weight_quantized"] - exact).max() < 0.5 + 1e-4
    bias = (norm.bias.double() - norm.running_mean.double() * factor).detach().numpy()
    step = float(calibration["conv1"]["_input_0"]["scale"]) * scale.flatten().numpy()
    assert stored["conv1.bias_quantized"].dtype == np.int32
    assert np.abs(stored["conv1.bias_quantized"] * step - bias).max() < step.max()


def test_a_linear_layer_worked_out_by_hand() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, -0.6]])
    layer.bias.data = torch.tensor([0.3])
    grid = {"zero_point": torch.tensor(0), "quant_min": -127, "quant_max": 127, "quant_dtype": "int8"}
    calibration = {
        "": {
            "_input_0": grid | {"scale": torch.tensor(0.5)},
            "weight": grid | {"scale": torch.tensor(0.25)},
            "_output_0": grid | {"scale": torch.tensor(2.0)},
        }
    }
    real = lower_int8(layer, calibration, [], torch.zeros(2, 2), reduce_range=False).as_module()
    # weights on the grid: 4 and -2 (of 0.25); bias: 0.3 / 0.125 = 2.4, so 2 of 0.125
    x = torch.tensor([[3.2, 1.0], [100.0, 0.0], [-60.0, 100.0], [0.0, 0.0]])
    # inputs on the grid of 0.5: (6, 2), (127, 0), (-120, 127), (0, 0)
    # sums: 24-4+2=22, 508+2=510, -480-254+2=-732, 2; times 0.125: 2.75, 63.75, -91.5, 0.25; on the grid of 2:
    assert real(x).flatten().tolist() == [2.0, 64.0, -92.0, 0.0]


def test_on_dyadic_grids_real_and_simulated_are_bitwise_equal() -> None:
    """Without rounding in the requantization nothing can differ: not the ReLU, the pooling, the bias."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten()
    ).eval()
    model.append(nn.Linear(288, 6))
    x = torch.randn(32, 3, 16, 16)
    calibration = calibrate(model, x, ["0", "3", "6"], outputs=False)
    calibration["6"]["_output_0"] = entry(torch.tensor(-1.0), torch.tensor(1.0))
    for name, targets in calibration.items():
        for grid in targets.values():
            grid["scale"] = 2 ** grid["scale"].log2().ceil()
        bias: Any = model.get_submodule(name).bias
        bias.data = (bias.data * 64).round() / 64
    lowered, simulated, real = run_both(model, calibration, [], x)
    assert lowered.float_layers == ()
    assert simulated.unique().numel() > 20
    assert torch.equal(simulated, real)


def test_real_and_simulated_differ_by_rounding_alone(residual: tuple[nn.Module, Tensor]) -> None:
    stem: Any = residual[0].stem
    model = nn.Sequential(copy.deepcopy(stem)).eval()
    x = residual[1]
    calibration = calibrate(model, x, ["0"], per_channel=True)
    _, simulated, real = run_both(model, calibration, [], x)
    steps = ((simulated - real) / calibration["0"]["_output_0"]["scale"]).abs()
    assert steps.max() < 1.01
    assert (steps > 0.5).float().mean() < 1e-3


def test_reduce_range_stores_seven_bits_at_twice_the_scale(residual: tuple[nn.Module, Tensor]) -> None:
    model, x = residual
    calibration = calibrate(model, x, RESIDUAL_LAYERS, folds=RESIDUAL_FOLDS, per_channel=True)
    stored = constants(lower_int8(model, calibration, RESIDUAL_FOLDS, x[:2], reduce_range=True))
    for layer in RESIDUAL_LAYERS:
        values = stored[f"{layer}.weight_quantized"].astype(int)
        assert 60 <= np.abs(values).max() <= 64
        assert np.array_equal(
            stored[f"{layer}.weight_scale"], 2 * calibration[layer]["weight"]["scale"].flatten().numpy()
        )


@pytest.mark.parametrize("vnni, reduced", [(True, False), (False, True)])
def test_reduce_range_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, vnni: bool, reduced: bool) -> None:
    from raycomp.deploy.int8 import int8
    from raycomp.deploy.measure import Hardware

    monkeypatch.setattr(int8, "hardware", lambda: Hardware("test", vnni, 1))
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(4, 4)
    lowered = lower_int8(model, calibrate(model, x, ["0"]), [], x)
    assert (lowered.reduce_range, lowered.vnni) == (reduced, vnni)


@pytest.mark.parametrize("activation, weight", [("uint4", "int4"), ("int5", "uint8"), ("int8", "uint3")])
def test_widths_below_eight_keep_their_own_range(activation: str, weight: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)).eval()
    x = torch.randn(8, 3, 10, 10)
    calibration = calibrate(model, 0.5 * x, ["0", "1"], activation=(activation, "affine"), weight=(weight, "symmetric"))
    lowered, simulated, real = run_both(model, calibration, [], x)
    assert lowered.float_layers == ()
    assert real.unique().numel() <= 2 ** int(activation.lstrip("uint"))
    assert np.unique(constants(lowered)["0.weight_quantized"]).size <= 2 ** int(weight.lstrip("uint"))
    # A rare rounding to the neighbouring one of few levels weighs more than with 8 bits.
    assert sqnr_db(simulated, real) > 25


@pytest.mark.parametrize("dtype", ["uint16", "int10"])
def test_wide_activations_are_stored_in_sixteen_bits(dtype: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.randn(32, 6)
    calibration = calibrate(model, 0.7 * x, ["0", "2"], activation=(dtype, "affine"), weight=("int12", "symmetric"))
    lowered, simulated, real = run_both(model, calibration, [], x)
    assert constants(lowered)["0._input_0_zero_point"].dtype == np.uint16
    assert constants(lowered)["0.weight_quantized"].dtype == np.int16
    assert sqnr_db(simulated, real) > 60
    assert set(lowered.float_layers) == {"0", "2"}


PER_CHANNEL = {
    "convolution": (nn.Conv2d(6, 6, 3), (6, 5, 5)),
    "linear": (nn.Linear(6, 6), (6,)),
    "linear on sequences": (nn.Linear(6, 6), (6, 6)),
    "average pooling": (nn.AvgPool2d(2), (6, 4, 4)),
}


@pytest.mark.parametrize("case", PER_CHANNEL)
def test_scales_that_integer_kernels_would_misread_are_computed_in_float(case: str) -> None:
    """ONNX Runtime 1.31 fuses such models all the same: it then fails, or computes something else."""
    torch.manual_seed(3)
    layer, shape = PER_CHANNEL[case]
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    x = torch.randn(8, *shape) * torch.logspace(-1, 1, 6).view(1, 6, *[1] * (len(shape) - 1))
    calibration = calibrate(model, x, ["0"])
    dims = tuple(range(2, x.ndim))
    calibration["0"]["_input_0"] = entry(x.amin((0, *dims), True), x.amax((0, *dims), True), axis=1)
    if "weight" in calibration["0"]:
        weight: Any = model[0].weight
        weight.data *= torch.logspace(-1, 0, 6).view(1, 6, *[1] * (weight.ndim - 2))
        dims = (0, *range(2, weight.ndim))
        calibration["0"]["weight"] = entry(weight.detach().amin(dims, True), weight.detach().amax(dims, True), axis=1)
    lowered, simulated, real = run_both(model, calibration, [], x)
    assert constants(lowered)["0._input_0_scale"].shape == (6,)
    assert integer_operators(lowered) == 0
    assert sqnr_db(simulated, real) > 45


def test_an_affine_weight_and_a_bias_on_its_own_grid() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(8, 3, 10, 10)
    folds = [("0", "1")]
    calibration = calibrate(model, x, ["0", "2"], folds=folds, weight=("uint8", "affine"), per_channel=True)
    for name in ("0", "2"):
        bias: Any = model.get_submodule(name).bias
        calibration[name]["bias"] = entry(bias.detach().min(), bias.detach().max(), "int4")
    lowered, simulated, real = run_both(model, calibration, folds, x)
    assert lowered.float_layers == ()
    assert sqnr_db(simulated, real) > 40
    bias.data = torch.round(bias.data / calibration["2"]["bias"]["scale"]) * calibration["2"]["bias"]["scale"]
    del calibration["2"]["bias"]
    with torch.no_grad():
        assert torch.allclose(simulated, simulate_int8(model, calibration, folds)(x), atol=1e-6)


def test_a_channel_of_zero_weights_keeps_its_bias() -> None:
    """Its scale is the smallest there is, and the bias in that unit would not fit into int32."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=True)).eval()
    conv: Any = model[0]
    conv.weight.data[1] = 0
    conv.bias.data[1] = 6.0
    x = torch.randn(8, 3, 8, 8)
    lowered, simulated, real = run_both(model, calibrate(model, x, ["0"], per_channel=True), [], x)
    assert lowered.grown_scales == ("0.weight_quantized",)
    assert sqnr_db(simulated, real) > 45
    assert torch.allclose(real[:, 1], simulated[:, 1], atol=0.05)


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.relu(self.conv(x))))


def test_a_layer_that_is_called_twice_is_stored_once() -> None:
    torch.manual_seed(5)
    model, x = SharedLayer().eval(), torch.randn(8, 4, 8, 8)
    lowered, simulated, real = run_both(model, calibrate(model, x, ["conv"]), [], x)
    assert [name for name in constants(lowered) if "weight_quantized" in name] == ["conv.weight_quantized"]
    assert lowered.execution.operators["QLinearConv"] == 2
    assert sqnr_db(simulated, real) > 35


def test_a_model_of_a_million_parameters_takes_at_most_thirty_percent() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten())
    model.extend([nn.Linear(128 * 16, 440), nn.ReLU(), nn.Linear(440, 10)])
    x = torch.randn(4, 3, 8, 8)
    calibration = calibrate(model.eval(), x, ["0", "2", "5", "7"], per_channel=True)
    lowered = lower_int8(model, calibration, [], x)
    parameters = count_parameters(model)
    assert 0.9e6 < parameters < 1.1e6
    assert lowered.float_weight_bytes == 4 * parameters
    assert lowered.weight_bytes < 0.30 * 4 * parameters
    assert len(lowered.onnx) < 0.30 * 4 * parameters


def test_the_float_model_is_left_alone(residual: tuple[nn.Module, Tensor]) -> None:
    model = copy.deepcopy(residual[0]).double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = residual[1]
    calibration = calibrate(residual[0], x, RESIDUAL_LAYERS, folds=RESIDUAL_FOLDS)
    lowered = lower_int8(model, calibration, RESIDUAL_FOLDS, x[:1].double())
    assert model.training and type(model.bn1) is nn.BatchNorm2d
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert lowered.as_module()(x.double()).dtype == torch.float32


def broken(change: dict[str, Any]) -> Calibration:
    return {"0": {"weight": entry(torch.tensor(-1.0), torch.tensor(1.0)) | change}}


@pytest.mark.parametrize(
    "calibration, folds, message",
    [
        ({}, [], "nothing was quantized"),
        ({"conv": broken({})["0"]}, [], "'conv', which the model does not have"),
        ({"0": {"gain": broken({})["0"]["weight"]}}, [], "no parameter 'gain'"),
        (broken({"scale": torch.tensor(float("nan"))}), [], r"0\.weight: the calibration's scale is nan"),
        (
            broken({"quant_max": 2**17, "quant_dtype": "int18"}),
            [],
            "quant_dtype is 'int18'",
        ),
        (broken({}), [("0", "norm")], "no module 'norm'"),
        (broken({}), [("1", "2")], "a ReLU cannot host a batch norm"),
        ({"2": broken({})["0"]}, [("0", "2")], "no parameter 'weight'"),
    ],
)
def test_what_cannot_be_lowered_is_refused(
    calibration: Calibration, folds: list[tuple[str, ...]], message: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
    with pytest.raises(RaycompError, match=message):
        lower_int8(model, calibration, folds, torch.randn(2, 4))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(4, 4)
    with pytest.raises(SpeedupError, match=r"onnxscript.*pip install 'raycomp\[int8\]'"):
        lower_int8(model, calibrate(model, x, ["0"]), [], x)


def test_lowering_is_silent(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(4, 4)
    lower_int8(model, calibrate(model, x, ["0"]), [], x).as_module()(x)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_sqnr() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, torch.tensor([3.0, 3.5])) == pytest.approx(20.0)  # 25 / 0.25 = 100
    assert sqnr_db(reference, reference) == float("inf")
