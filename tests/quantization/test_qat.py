"""Quantization-aware training: golden ranges, when it starts, what it watches, and what it leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raycomp.core.batch_share import BatchShare, use_share
from raycomp.core.chain import Chain
from raycomp.core.moments import RunContext
from raycomp.core.target import TargetId
from raycomp.errors import CompressionError, ConfigError
from raycomp.pruning import L1NormPruner
from raycomp.quantization import QATQuantizer


def linear(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A layer whose weight lies in [-1, 3]."""
    model = nn.Sequential(nn.Linear(2, 2)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1.0, 3.0], [0.5, 0.25]]))
        model[0].bias.zero_()
    return model


def train(quantizer: QATQuantizer, *batches: Tensor, learning_rate: float = 0.0) -> list[Tensor]:
    """One step on each batch; gives the outputs."""
    model, outputs = quantizer.model, []
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    model.train()
    with quantizer.chain.run([optimizer]):
        for batch in batches:
            optimizer.zero_grad()
            outputs.append(model(batch))
            outputs[-1].sum().backward()
            optimizer.step()
    return [output.detach() for output in outputs]


def quantized(model: nn.Module, **settings: Any) -> QATQuantizer:
    return QATQuantizer(model, [{"op_types": ["Linear"], **settings}])


@pytest.mark.parametrize(
    ("dtype", "scheme", "scale", "zero_point"),
    [
        ("int8", "symmetric", 3 / 127, 0),
        ("int8", "affine", 4 / 254, -63),
        ("uint8", "symmetric", 3 / 127.5, 128),
        ("uint4", "affine", 4 / 15, 4),
    ],
)
def test_the_golden_scales_of_a_weight(dtype: str, scheme: str, scale: float, zero_point: int) -> None:
    quantizer = quantized(linear(), target_names=["weight"], quant_dtype=dtype, quant_scheme=scheme)
    train(quantizer, torch.ones(1, 2))
    found = quantizer.get_calibration_config()["0"]["weight"]
    assert float(found["scale"]) == pytest.approx(scale, rel=1e-6)
    assert int(found["zero_point"]) == zero_point
    assert (float(found["tracked_min"]), float(found["tracked_max"])) == (-1, 3)
    assert (found["quant_dtype"], found["quant_scheme"], found["axis"]) == (dtype, scheme, None)
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    assert found["quant_bits"] == bits


def test_an_inputs_maximum_is_a_moving_average() -> None:
    quantizer = quantized(linear(), target_names=["_input_"])
    # What the first step saw, unquantized, has no part in it.
    train(quantizer, torch.tensor([[9.0, -9.0]]), torch.tensor([[1.0, -0.5]]), torch.tensor([[2.0, -0.5]]))
    found = quantizer.get_calibration_config()["0"]["_input_0"]
    assert float(found["tracked_max"]) == pytest.approx(1.01, rel=1e-6)
    assert float(found["tracked_min"]) == pytest.approx(-0.5, rel=1e-6)
    assert float(found["scale"]) == pytest.approx(1.01 / 127, rel=1e-6)


def test_a_step_that_runs_several_batches_has_the_range_of_them_all() -> None:
    model = linear()
    quantizer = quantized(model, target_names=["_input_"])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with quantizer.chain.run([optimizer]):
        for batch in ([[1.0, 0.0]], [[-2.0, 3.0]], [[0.0, 0.5]]):
            model(torch.tensor(batch)).sum().backward()
        optimizer.step()
    found = quantizer.get_calibration_config()["0"]["_input_0"]
    assert (float(found["tracked_min"]), float(found["tracked_max"])) == (-2, 3)


def test_per_channel_scales() -> None:
    quantizer = quantized(
        linear(),
        target_names=["weight", "_input_"],
        target_settings={"weight": {"granularity": "out_channel"}, "_input_": {"granularity": "per_channel"}},
    )
    train(quantizer, torch.tensor([[1.0, -4.0], [2.0, 3.0]]))
    found = quantizer.get_calibration_config()["0"]
    assert found["weight"]["axis"] == 0
    assert torch.allclose(found["weight"]["scale"], torch.tensor([[3.0], [0.5]]) / 127)
    assert found["_input_0"]["axis"] == 1
    assert torch.allclose(found["_input_0"]["scale"], torch.tensor([[2.0, 4.0]]) / 127)


def test_before_its_start_step_it_watches_and_changes_nothing() -> None:
    model = linear()
    quantizer = QATQuantizer(model, [{"op_types": ["Linear"], "quant_dtype": "int2"}], quant_start_step=3)
    batches = [torch.tensor([[0.3, 0.7]]) * (step + 1) for step in range(5)]
    outputs = train(quantizer, *batches)
    plain = linear()
    exact = [torch.equal(output, plain(batch)) for output, batch in zip(outputs, batches, strict=True)]
    assert exact == [True, True, True, False, False]
    tracked = float(quantizer.get_calibration_config()["0"]["_input_0"]["tracked_max"])
    # The average begins with the fourth batch, the first that was quantized.
    assert tracked == pytest.approx(0.99 * 0.7 * 4 + 0.01 * 0.7 * 5, rel=1e-5)


def test_until_a_quantized_step_has_passed_the_average_of_the_others_serves() -> None:
    quantizer = QATQuantizer(linear(), [{"op_types": ["Linear"], "target_names": ["_input_"]}], quant_start_step=2)
    tracked = []
    for value in (1.0, 2.0, 5.0, 7.0):
        train(quantizer, torch.tensor([[value, 0.0]]))
        tracked.append(float(quantizer.quantizers[TargetId("0", "_input_0")].tracked_max))
    assert tracked == pytest.approx([1.0, 1.01, 5.0, 5.02], rel=1e-6)


def test_a_range_is_that_of_observing_in_the_quantized_forward_pass() -> None:
    """The second of two layers is given what the first rounds: the average of 24 steps is near what they give it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    entries = [
        {"op_names": ["0"], "target_names": ["_output_"], "quant_dtype": "uint2"},
        {"op_names": ["1"], "target_names": ["_input_"]},
    ]
    quantizer = QATQuantizer(model, entries)
    batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(step)) for step in range(24)]
    seen: list[float] = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(float(args[0].detach().max())), prepend=True)
    train(quantizer, *batches)
    expected = seen[1]
    for value in seen[2:]:
        expected = 0.99 * expected + 0.01 * value
    assert float(quantizer.quantizers[TargetId("1", "_input_0")].tracked_max) == pytest.approx(expected, rel=1e-5)


def test_there_is_no_calibration_of_what_is_not_quantized_yet() -> None:
    quantizer = QATQuantizer(linear(), [{"op_types": ["Linear"]}], quant_start_step=3)
    train(quantizer, torch.ones(1, 2))
    assert quantizer.get_calibration_config() == {}


def test_the_first_step_quantizes_weights_and_no_activations() -> None:
    model = linear()
    quantizer = quantized(model, target_names=["weight", "_input_"], quant_dtype="int2")
    first, second = train(quantizer, torch.tensor([[0.3, 0.7]]), torch.tensor([[0.3, 0.7]]))
    # int2 symmetric has the levels -1, 0, 1 times 3: the weight is [[0, 3], [0, 0]].
    assert torch.allclose(first, torch.tensor([[2.1, 0.0]]))
    # The input's step is 0.7: 0.3 / 0.7 rounds to 0.
    assert torch.allclose(second, torch.tensor([[2.1, 0.0]]))
    assert torch.allclose(model.eval()(torch.tensor([[0.4, 0.7]])), torch.tensor([[2.1, 0.0]]))


def test_evaluation_and_idle_ranks_do_not_count() -> None:
    model = linear()
    quantizer = quantized(model, target_names=["_input_"])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with quantizer.chain.run(RunContext([optimizer])):
        quantizer.chain.training_step(lambda: model.train()(torch.ones(1, 2)).sum(), None).backward()
        with use_share(BatchShare(0, 4)):
            quantizer.chain.training_step(lambda: model(torch.full((1, 2), 50.0)).sum(), None)
        model.eval()(torch.full((1, 2), 70.0))
        optimizer.step()
    assert float(quantizer.get_calibration_config()["0"]["_input_0"]["tracked_max"]) == 1


def test_what_is_watched_is_no_buffer_that_ddp_could_overwrite() -> None:
    model = linear()
    quantized(model, target_names=["_input_"])
    model.train()(torch.ones(1, 2))
    assert not [name for name, _ in model.named_buffers() if "watcher" in name]


def test_float64_ranges_stay_float64() -> None:
    third = torch.tensor([[1 / 3, 0.1]], dtype=torch.float64)
    quantizer = quantized(linear(torch.float64))
    train(quantizer, third)
    found = quantizer.get_calibration_config()["0"]
    assert float(found["_input_0"]["tracked_max"]) == 1 / 3
    assert float(found["weight"]["scale"]) == 3 / 127
    assert {values["scale"].dtype for values in found.values()} == {torch.float64}


def test_bfloat16_activations_are_averaged_in_float32() -> None:
    model = linear()
    quantizer = quantized(model, target_names=["_output_"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = train(quantizer, torch.ones(1, 2), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 2.0]]))
    found = quantizer.get_calibration_config()["0"]["_output_0"]["tracked_max"]
    assert outputs[0].dtype == torch.bfloat16
    assert found.dtype == torch.float32
    # In bfloat16 the average of 2 and 4 would stay 2.
    assert float(found) == pytest.approx(2.02, rel=1e-6)


@pytest.mark.parametrize("pruner_first", [True, False])
def test_a_weights_range_is_that_of_what_the_mask_leaves(pruner_first: bool) -> None:
    model = linear()
    prune, quantize = [{"op_types": ["Linear"], "sparse_ratio": 0.5}], [{"op_types": ["Linear"]}]
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0.5], [0.0, -2.25]]))
    # Row 1 has the smaller norm and the greater entry.
    if pruner_first:
        quantizer = QATQuantizer.from_compressor(L1NormPruner(model, prune), quantize)
    else:
        quantizer = QATQuantizer(model, quantize)
        L1NormPruner.from_compressor(quantizer, prune)
    quantizer.chain.begin()
    assert float(quantizer.get_calibration_config()["0"]["weight"]["scale"]) == pytest.approx(2 / 127)


def test_gradients_pass_straight_through_inside_the_range_alone() -> None:
    model = linear()
    quantizer = quantized(model, target_names=["_input_"])
    train(quantizer, torch.tensor([[1.0, 1.0]]))
    value = torch.tensor([[0.5, 1.5]], requires_grad=True)
    model(value).sum().backward()
    # Columns of the weight sum to -0.5 and 3.25; 1.5 is beyond the range.
    assert value.grad is not None
    assert value.grad.tolist() == [[-0.5, 0.0]]


def test_a_reloaded_state_quantizes_as_the_saved_one() -> None:
    quantizer = quantized(linear(), target_settings={"weight": {"granularity": "out_channel"}})
    train(quantizer, torch.tensor([[1.0, 2.0]]))
    fresh = quantized(linear(), target_settings={"weight": {"granularity": "out_channel"}})
    fresh.model.load_state_dict(quantizer.model.state_dict())
    value = torch.randn(5, 2)
    assert torch.equal(fresh.model.eval()(value), quantizer.model.eval()(value))
    copied = copy.deepcopy(quantizer.model)
    assert torch.equal(copied(value), quantizer.model(value))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_moving_average_of_the_model_made_at_the_beginning_quantizes(use_buffers: bool) -> None:
    """It takes over tensors alone: whether and how it rounds must be among them."""
    settings = {"weight": {"granularity": "out_channel"}, "_input_": {"granularity": "per_channel"}}
    model = linear()
    quantizer = QATQuantizer(Chain(model, torch.ones(1, 2)), [{"op_types": ["Linear"], "target_settings": settings}])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=use_buffers)
    averaged.update_parameters(model)
    train(quantizer, *[torch.tensor([[1.0, 2.0]]) for _ in range(3)])
    averaged.update_parameters(model)
    value = torch.randn(5, 2)
    assert torch.equal(averaged.eval()(value), model.eval()(value))
    assert not torch.equal(averaged(value), linear()(value))


def test_torch_s_own_mean_of_buffers_can_be_made_of_a_quantized_model() -> None:
    quantizer = quantized(linear(), target_names=["weight"])
    averaged = AveragedModel(quantizer.model, use_buffers=True)
    averaged.update_parameters(quantizer.model)
    train(quantizer, torch.tensor([[1.0, 2.0]]))
    averaged.update_parameters(quantizer.model)
    (enabled,) = (value for name, value in averaged.named_buffers() if name.endswith("enabled"))
    assert bool(enabled)


def test_whether_it_rounds_is_read_again_where_it_was_written() -> None:
    quantizer = quantized(linear(), target_names=["weight"])
    train(quantizer, torch.tensor([[1.0, 2.0]]))
    module = quantizer.quantizers[TargetId("0", "weight")]
    assert module.active
    state = {name: value.clone() for name, value in module.state_dict().items()}
    module.reset()
    assert not module.active
    module.load_state_dict(state, assign=True)
    assert module.active and copy.deepcopy(module).active
    module.enabled.fill_(False)
    assert not module.active
    with torch.inference_mode():
        assert copy.deepcopy(module).active is False


def test_a_stored_calibration_can_be_taken_over() -> None:
    quantizer = quantized(linear())
    train(quantizer, torch.tensor([[1.0, 2.0]]))
    fresh = quantized(linear())
    fresh.update_calibration_config(quantizer.get_calibration_config())
    value = torch.randn(5, 2)
    assert torch.equal(fresh.model.eval()(value), quantizer.model.eval()(value))
    with pytest.raises(CompressionError, match=r"0.wight: QATQuantizer has no such target"):
        fresh.update_calibration_config({"0": {"wight": {}}})


def test_weights_alone_can_be_loaded_into_a_quantized_model() -> None:
    quantizer = quantized(linear(), target_names=["weight"])
    train(quantizer, torch.tensor([[1.0, 2.0]]))
    weight = {"0.parametrizations.weight.original": torch.zeros(2, 2)}
    assert not quantizer.model.load_state_dict(weight, strict=False).unexpected_keys
    assert not quantizer.model[0].weight.any()
    assert float(quantizer.get_calibration_config()["0"]["weight"]["tracked_max"]) == 3


def test_a_stored_scale_is_taken_as_it_is() -> None:
    quantizer = quantized(linear(), target_names=["weight"], quant_scheme="affine")
    train(quantizer, torch.tensor([[1.0, 2.0]]))
    calibration = quantizer.get_calibration_config()
    calibration["0"]["weight"] |= {"scale": torch.tensor(0.5), "zero_point": torch.tensor(3)}
    quantizer.update_calibration_config(calibration)
    found = quantizer.get_calibration_config()["0"]["weight"]
    assert (float(found["scale"]), int(found["zero_point"])) == (0.5, 3)
    assert (float(found["tracked_min"]), float(found["tracked_max"])) == (-1, 3)


def test_bypass_is_watched_and_not_quantized() -> None:
    model = linear()
    quantizer = quantized(model, apply_method="bypass", quant_dtype="int2")
    train(quantizer, torch.tensor([[0.3, 0.7]]))
    assert torch.equal(model.eval()(torch.tensor([[0.3, 0.7]])), linear()(torch.tensor([[0.3, 0.7]])))
    assert quantizer.get_calibration_config() == {}


def test_blocks_are_no_granularity_of_scales() -> None:
    with pytest.raises(ConfigError, match=r"config_list\[0\].granularity: \(2,\) is not a granularity of scales"):
        quantized(linear(), granularity=[2])


@pytest.mark.parametrize(
    ("layer", "granularity", "axis"),
    [
        (nn.Conv2d(2, 3, 1), "out_channel", 0),
        (nn.Conv2d(2, 3, 1), "in_channel", 1),
        (nn.ConvTranspose2d(2, 3, 1), "out_channel", 1),
        (nn.ConvTranspose2d(2, 3, 1), "in_channel", 0),
        (nn.ConvTranspose2d(2, 3, 1), "default", None),
        (nn.ConvTranspose2d(2, 3, 1), "per_channel", 1),
    ],
)
def test_a_weights_scales_lie_along_its_channels(layer: nn.Module, granularity: str, axis: int | None) -> None:
    entry = {"op_names": ["0"], "target_names": ["weight"], "granularity": granularity}
    quantizer = QATQuantizer(nn.Sequential(layer), [entry])
    quantizer.set_parameter_ranges(active=True)
    found = quantizer.get_calibration_config()["0"]["weight"]
    sizes = [1] * 4 if axis is not None else []
    if axis is not None:
        sizes[axis] = layer.weight.shape[axis]
    assert (found["axis"], list(found["scale"].shape)) == (axis, sizes)


def test_each_channel_of_an_input_has_its_own_range() -> None:
    quantizer = quantized(linear(), target_names=["_input_"], granularity="per_channel")
    train(quantizer, torch.tensor([[1.0, -2.0], [3.0, 5.0]]))
    found = quantizer.get_calibration_config()["0"]["_input_0"]
    assert (found["axis"], found["tracked_min"].tolist(), found["tracked_max"].tolist()) == (1, [[1, -2]], [[3, 5]])


def test_a_grouped_transposed_convolutions_output_channels_have_a_scale_each() -> None:
    """Six output channels in two groups; the k-th is scaled by 2^-k, so all lose the same to rounding."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    magnitude = 2.0 ** -torch.arange(6)
    with torch.no_grad():
        layer.weight.view(2, 2, 3, 2, 2).mul_(magnitude.view(2, 1, 3, 1, 1))
    weight = layer.weight.detach().clone()
    entry = {"op_names": ["0"], "target_names": ["weight"], "granularity": "out_channel"}
    quantizer = QATQuantizer(nn.Sequential(layer), [entry])
    quantizer.set_parameter_ranges(active=True)
    found = quantizer.get_calibration_config()["0"]["weight"]
    per_channel = weight.view(2, 2, 3, 4).abs().amax((1, 3))
    assert torch.allclose(found["scale"].view(2, 2, 3), per_channel.view(2, 1, 3).expand(2, 2, 3) / 127)
    error = (layer.weight - weight).view(2, 2, 3, 4).abs().amax((1, 3)) / per_channel
    assert 0 < float(error.max()) <= 0.5 / 127 + 1e-6


@pytest.mark.parametrize(
    ("layer", "target", "granularity", "message"),
    [
        (nn.Linear(2, 2), "_input_", "out_channel", "0._input_0 is an input, which has no out_channels"),
        (nn.Linear(2, 2), "_output_", "in_channel", "0._output_0 is an output, which has no in_channels"),
        (nn.Linear(2, 2), "bias", "in_channel", "0.bias has no input channels of its own"),
        (nn.ConvTranspose2d(2, 2, 1, groups=2), "weight", "in_channel", "0.weight has no input channels of its own"),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", "in_channel", "0.weight has no input channels of its own"),
        (nn.GELU(), "_output_", "per_channel", "which dimension of 0._output_0 holds its channels isn't known"),
    ],
)
def test_a_granularity_that_names_no_channels_is_refused(
    layer: nn.Module, target: str, granularity: str, message: str
) -> None:
    entry = {"op_names": ["0"], "target_names": [target], "granularity": granularity}
    with pytest.raises(ConfigError) as raised:
        QATQuantizer(nn.Sequential(layer), [entry])
    assert str(raised.value).startswith(f"config_list[0].granularity: {message}")


@pytest.mark.parametrize(
    ("layer", "target", "granularity", "shape"),
    [
        (nn.Linear(2, 3), "bias", "out_channel", [3]),
        (nn.Conv2d(2, 3, 1), "bias", "per_channel", [3]),
        (nn.Conv2d(2, 3, 1), "_input_", "in_channel", [1, 2, 1, 1]),
        (nn.Conv2d(2, 3, 1), "_output_", "out_channel", [1, 3, 1, 1]),
        (nn.Linear(2, 3), "_output_", "out_channel", [1, 1, 3]),
    ],
)
def test_a_granularity_of_values_and_biases_names_their_channels(
    layer: nn.Module, target: str, granularity: str, shape: list[int]
) -> None:
    entry = {"op_names": ["0"], "target_names": [target], "granularity": granularity}
    model = nn.Sequential(layer)
    quantizer = QATQuantizer(model, [entry])
    train(quantizer, torch.randn(4, 2, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(4, 5, 2))
    (found,) = quantizer.get_calibration_config()["0"].values()
    assert list(found["scale"].shape) == shape


def test_an_average_goes_on_from_a_calibration_that_was_taken_over() -> None:
    quantizer = quantized(linear(), target_names=["_input_"])
    train(quantizer, torch.ones(1, 2), torch.ones(1, 2))
    stored = quantizer.get_calibration_config()
    stored["0"]["_input_0"]["tracked_max"] = torch.tensor(10.0)
    quantizer.update_calibration_config(stored)
    fresh = quantized(linear(), target_names=["_input_"])
    fresh.update_calibration_config(stored)
    for each in (quantizer, fresh):
        train(each, torch.ones(1, 2))
        assert float(each.quantizers[TargetId("0", "_input_0")].tracked_max) == pytest.approx(9.91, rel=1e-6)


def test_a_functional_call_reads_its_own_tensors() -> None:
    quantizer = quantized(linear(), target_names=["weight"], quant_dtype="int2")
    module, value = quantizer.quantizers[TargetId("0", "weight")], torch.tensor([0.3, -0.8])
    rounds = [torch.func.functional_call(module, {"enabled": torch.tensor(on)}, (value,)) for on in (True, False) * 2]
    assert [bool((found != value).any()) for found in rounds] == [True, False] * 2


def test_a_calibration_without_a_range_names_what_it_lacks() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = QATQuantizer(model, [{"op_names": ["0"], "target_names": ["weight"], "quant_dtype": "int8"}], None)
    stored = {"0": {"weight": {"scale": torch.tensor(0.1), "zero_point": torch.tensor(0)}}}
    with pytest.raises(CompressionError, match=r"0\.weight: the calibration lacks tracked_min, tracked_max"):
        quantizer.update_calibration_config(stored)
