"""Modules that compute as one operator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.core.chain import Chain
from raycomp.core.reduction import reduce_
from raycomp.errors import CompressionError, ConfigError, FoldError
from raycomp.pruning import L1NormPruner
from raycomp.quantization import QATQuantizer
from raycomp.quantization.fold import fold_factor
from tests.pipeline.ranks import on_ranks

NEVER = 10**6


class Net(nn.Module):
    """Convolutions of each rank and a linear layer, each with a batch norm, and a call by keyword."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=bias)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.line = nn.Conv1d(4, 4, 1, bias=bias)
        self.line_norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3, bias=bias)
        self.fc_norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 2)
        self.last_relu = nn.ReLU6()

    def forward(self, images: Tensor) -> Tensor:
        value = self.relu(self.norm(input=self.conv(input=images)))
        value = self.line_norm(self.line(value.flatten(2))).mean(2)
        return self.last_relu(self.last(self.fc_norm(self.fc(value))))


FUSED = [("conv", "norm", "relu"), ("line", "line_norm"), ("fc", "fc_norm"), ("last", "last_relu")]


def net(bias: bool = True) -> Net:
    """With running statistics, gammas and betas of a trained one."""
    torch.manual_seed(0)
    model = Net(bias)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(-2, 2)
                module.bias.uniform_(-1, 1)
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return model


def folded(model: nn.Module, start: int = 0, fused: Any = FUSED, **keys: Any) -> QATQuantizer:
    entry = {"op_types": ["Conv2d", "Conv1d", "Linear"], "fuse_names": fused, **keys}
    return QATQuantizer(model, [entry], quant_start_step=start)


def images(seed: int = 1) -> Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def train(quantizer: QATQuantizer, steps: int, learning_rate: float = 0.05) -> list[float]:
    model, losses = quantizer.model, []
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    model.train()
    with quantizer.chain.run([optimizer]):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(images()) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_without_quantization_the_folded_model_is_the_unfolded_one(bias: bool, affine: bool) -> None:
    model, plain = net(bias), net(bias)
    if not affine:
        for each in (model, plain):
            each.norm.weight = each.norm.bias = None
    folded(model, NEVER)
    assert torch.allclose(model.eval()(images()), plain.eval()(images()), rtol=0, atol=1e-6)
    assert torch.allclose(model.train()(images()), plain.train()(images()), rtol=0, atol=1e-5)
    for name, value in plain.named_buffers():
        assert torch.allclose(model.get_buffer(name).double(), value.double(), atol=1e-5), name


def test_its_gradients_are_those_of_the_unfolded_one() -> None:
    model, plain = net(), net()
    folded(model, NEVER)
    for each in (model, plain):
        each.double().train()(images().double()).square().sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    found = {
        name.replace("parametrizations.", "").replace(".original", ""): p.grad for name, p in model.named_parameters()
    }
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-12), name


def test_a_tiny_gammas_gradient_is_not_that_of_its_inverse() -> None:
    quantizer = folded(net(), fused=FUSED[:1], target_names=["weight"])
    plain = net()
    for model in (quantizer.model, plain):
        with torch.no_grad():
            model.norm.weight[0] = 1e-4
    quantizer.chain.begin()
    for model in (quantizer.model, plain):
        model.train()(images()).square().sum().backward()
    expected, found = plain.norm.weight.grad, quantizer.model.norm.weight.grad
    # The channel's folded weights round to 0, so nothing of the true gradient of -0.16 is left; a gradient through
    # the division by the factor would be -30.
    assert float(expected[0]) == pytest.approx(-0.16, abs=0.01)
    assert float(found[0]) == 0
    assert torch.allclose(found[1:], expected[1:], rtol=0, atol=0.05)


def test_in_evaluation_the_folded_weight_is_what_is_quantized() -> None:
    model = net()
    quantizer = folded(model, fused=FUSED[:1], target_names=["weight"], op_names=["conv"])
    train(quantizer, 2)
    model.eval()
    found = quantizer.get_calibration_config()["conv"]["weight"]
    weight = model.conv.parametrizations.weight.original.detach()
    factor = model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)
    product = weight * factor.detach().view(-1, 1, 1, 1)
    assert float(found["scale"]) == pytest.approx(float(product.abs().max()) / 127, rel=1e-6)
    integers = (product / found["scale"]).round().clamp(-127, 127)
    bias = (model.conv.bias - model.norm.running_mean) * factor + model.norm.bias
    expected = functional.relu(functional.conv2d(images(), integers * found["scale"], bias))
    assert torch.allclose(model.conv(images()).value, expected, atol=1e-5)
    assert torch.equal(model.relu(model.norm(model.conv(images()))), model.conv(images()).value)


def test_outputs_are_watched_behind_the_whole_and_hosted_modules_have_no_targets() -> None:
    model = net()
    entry = {"op_types": ["Conv2d", "BatchNorm2d", "ReLU"], "fuse_names": FUSED[:1]}
    quantizer = QATQuantizer(model, [entry])
    train(quantizer, 3)
    calibration = quantizer.get_calibration_config()
    assert set(calibration) == {"conv"}
    # ReLU's output has no negative values, the convolution's own has.
    assert float(calibration["conv"]["_output_0"]["tracked_min"]) == 0
    assert quantizer.chain.folds() == [("conv", "norm", "relu")]


def test_it_trains() -> None:
    losses = train(folded(net()), 25)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("gammas", [[0.0, 1, 1, 1], [0.0, 0, 0, 0], [1e-12, 1, 1, 1]])
def test_a_gamma_of_zero_gives_no_nan_and_may_grow(gammas: list[float]) -> None:
    model = net()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor(gammas))
    losses = train(folded(model), 5)
    assert all(loss == loss for loss in losses)
    for name, parameter in model.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
    assert float(model.norm.weight.detach()[0]) != gammas[0]
    assert bool(torch.isfinite(model.eval()(images())).all())


def test_masked_channels_of_a_folded_pair_are_exactly_zero() -> None:
    model = net()
    align = {"op_names": ["norm"], "align": {"module_name": "conv"}}
    pruner = L1NormPruner(model, [{"op_names": ["conv"], "sparse_ratio": 0.5}, align])
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_names": ["conv"], "fuse_names": FUSED[:1]}])
    train(quantizer, 3)
    kept = pruner.get_masks()["conv"]["bias"]
    output = model.eval()(images()), model.conv(images()).value
    assert kept.sum() == 2
    assert bool((output[1][:, kept == 0] == 0).all())
    simulated = output[0]
    quantizer.unwrap_model()
    # Only quantization is gone.
    assert torch.allclose(model(images()), simulated, atol=0.1)


def test_unwrapping_and_wrapping_again() -> None:
    model = net()
    quantizer = folded(model)
    train(quantizer, 3)
    before = model.eval()(images())
    quantizer.unwrap_model()
    assert [type(module) for module in model.modules()] == [type(module) for module in net().modules()]
    assert list(model.state_dict()) == list(net().state_dict())
    quantizer.wrap_model()
    assert torch.equal(model(images()), before)


def test_a_copy_folds_its_own_modules() -> None:
    model = net()
    quantizer = folded(model)
    train(quantizer, 2)
    copied = copy.deepcopy(model).eval()
    expected = model.eval()(images())
    with torch.no_grad():
        model.norm.bias.add_(100)
    assert torch.equal(copied(images()), expected)
    with torch.no_grad():
        copied.norm.bias.add_(100)
    assert torch.equal(copied(images()), model(images()))


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ([("norm", "conv")], "BatchNorm2d + Conv2d can't be fused"),
        ([("conv", "relu", "norm")], "Conv2d + ReLU + BatchNorm2d can't be fused"),
        ([("conv", "norms")], "the model has no module 'norms'"),
        ([("conv", "fc_norm")], "fc_norm has 3 channels, conv gives 4"),
        ([("conv", "norm"), ("conv", "relu")], "conv is fused already by config_list[0].fuse_names"),
    ],
)
def test_what_can_not_compute_as_one_is_refused(fused: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        folded(net(), fused=fused)
    assert message in str(raised.value)


def test_a_norm_without_running_statistics_can_not_be_folded() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(ConfigError, match="1 keeps no running statistics"):
        QATQuantizer(model, [{"op_types": ["Conv2d"], "fuse_names": [("0", "1")]}])


def test_a_norm_behind_a_linear_layer_of_sequences_can_not_be_folded() -> None:
    # With as many positions as features, the batch norm itself would run.
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    QATQuantizer(model, [{"op_types": ["Linear"], "fuse_names": [("0", "1")]}])
    with pytest.raises(CompressionError, match=r"shape \(2, 4, 4\) has no channels in dimension 1"):
        model.eval()(torch.ones(2, 4, 4))


def test_the_factor_is_gamma_over_sigma() -> None:
    norm = nn.BatchNorm1d(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, -1.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    assert fold_factor(norm).tolist() == [1.5, -2.0]
    assert fold_factor(nn.BatchNorm1d(2, affine=False, eps=0.0)).tolist() == [1, 1]


def merged_range_on_a_rank(own: int, world: int) -> list[float]:
    """The running variance makes the folded weight 1 and 2 times -1 and 3."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-1.0, 3.0]).reshape(2, 1, 1, 1))
        model[1].running_var.fill_(1 / (own + 1) ** 2)
    quantizer = QATQuantizer(model, [{"op_names": ["0"], "target_names": ["weight"], "fuse_names": [("0", "1")]}])
    reduce_(quantizer.statistics())
    quantizer.set_parameter_ranges(active=True)
    found = quantizer.get_calibration_config()["0"]["weight"]
    return [float(found["tracked_min"]), float(found["tracked_max"])]


def test_workers_whose_norms_saw_other_batches_agree_on_the_range() -> None:
    assert on_ranks(2, merged_range_on_a_rank) == [[-2, 6]] * 2


class Block(nn.Module):
    """The usual block of a ResNet, whose one ReLU runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.c2, self.b2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, value: Tensor) -> Tensor:
        inner = self.relu(self.b1(self.c1(value)))
        return self.relu(self.b2(self.c2(inner)) + value)


def block_and_images() -> tuple[Block, Tensor]:
    torch.manual_seed(1)
    block = Block().eval()
    for norm in (block.b1, block.b2):
        norm.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr, operator]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return block, torch.randn(4, 3, 6, 6)


def fused_block(block: nn.Module, *folds: tuple[str, ...], example: Any = None) -> QATQuantizer:
    config = [{"op_types": ["Conv2d"], "target_names": ["weight"], "fuse_names": list(folds)}]
    return QATQuantizer(Chain(block, example), config, quant_start_step=NEVER)


@pytest.mark.parametrize(
    "folds",
    [
        [("c1", "b1", "relu"), ("c2", "b2")],
        [("c1", "b1", "relu")],
        [("c1", "b1"), ("c2", "b2")],
    ],
)
def test_the_call_of_an_activation_that_is_not_folded_stays(folds: list[tuple[str, ...]]) -> None:
    block, images = block_and_images()
    expected = block(images)
    fused_block(block, *folds, example=images).rehearse()
    assert torch.allclose(block.eval()(images), expected, atol=1e-6)
    assert block(images).min() == 0


def test_one_activation_may_stand_behind_two_hosts() -> None:
    class Two(Block):
        def forward(self, value: Tensor) -> Tensor:
            return self.relu(self.b2(self.c2(self.relu(self.b1(self.c1(value))))))

    torch.manual_seed(1)
    model, images = Two().eval(), torch.randn(4, 3, 6, 6)
    expected = model(images)
    quantizer = fused_block(model, ("c1", "b1", "relu"), ("c2", "b2", "relu"))
    assert torch.allclose(model(images), expected, atol=1e-6)
    quantizer.unwrap_model()
    assert type(model.relu) is nn.ReLU and "raycomp" not in str(vars(model.relu))


class Crooked(Block):
    """Something else, too, uses what comes from the first convolution."""

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use = use

    def forward(self, value: Tensor) -> Tensor:
        return self.use(self, self.c1(value))


CROOKED = {
    "a sum": lambda self, inner: self.relu(self.b1(inner)) + inner,
    "a sum from the left": lambda self, inner: inner + self.relu(self.b1(inner)),
    "a function": lambda self, inner: self.relu(self.b1(functional.dropout(inner))),
    "a method": lambda self, inner: self.relu(self.b1(inner.contiguous())),
    "another layer": lambda self, inner: self.relu(self.b1(self.c2(inner))),
    "the norm left out": lambda self, inner: self.relu(inner),
    "a concatenation": lambda self, inner: torch.cat([self.relu(self.b1(inner)), inner]),
    "a comparison": lambda self, inner: self.relu(self.b1(inner)) * (inner > 0),
    "an equality": lambda self, inner: self.relu(self.b1(inner)) if inner == 0 else inner,
    "an index": lambda self, inner: self.relu(self.b1(inner))[:1] * inner[:1],
}


@pytest.mark.parametrize("use", CROOKED.values(), ids=list(CROOKED))
def test_members_that_are_not_each_others_alone_are_refused(use: Any) -> None:
    block, images = Crooked(use).eval(), torch.randn(2, 3, 6, 6)
    quantizer = fused_block(block, ("c2", "b2"), ("c1", "b1", "relu"), example=images)
    with pytest.raises(ConfigError, match=r"config_list\[0\]\.fuse_names: c1 \+ b1 \+ relu are fused, and"):
        quantizer.rehearse()
    with pytest.raises(FoldError, match=r"c1 \+ b1 \+ relu are fused, and .* uses what c1 gives"):
        block(images)


def test_a_host_that_the_model_gives_away_is_told() -> None:
    block, images = Block(), torch.randn(2, 3, 6, 6)
    fused_block(block, ("c1", "b1"))
    with pytest.raises(FoldError, match=r"c1 \+ b1 are fused, and square uses what c1 gives"):
        torch.square(block.c1(images))
    assert block.c1(images).shape == (2, 3, 6, 6)


def test_a_forward_that_is_called_past_the_module_is_refused() -> None:
    """Nobody would know then that norm and activation have been computed."""

    class Past(Block):
        def forward(self, value: Tensor) -> Tensor:
            return self.relu(self.b1(self.c1.forward(value)))

    block, images = Past().eval(), torch.randn(2, 3, 6, 6)
    quantizer = fused_block(block, ("c1", "b1", "relu"), example=images)
    with pytest.raises(ConfigError, match=r"the model calls c1\.forward itself"):
        quantizer.rehearse()


class Asking(nn.Module):
    """Looks at what it has before it passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        value = images
        for module in (self.conv, self.norm, self.relu):
            value = module(value)
            assert isinstance(value, Tensor) and value.shape == (3, 2, 4, 4)
        return value


def test_a_forward_that_asks_whether_it_has_a_tensor_hears_that_it_has() -> None:
    model, images = Asking(), torch.ones(3, 1, 4, 4)
    entry = {"op_names": ["conv"], "target_names": ["weight"], "fuse_names": [("conv", "norm", "relu")]}
    QATQuantizer(Chain(model, images), [entry], quant_start_step=NEVER)
    assert model(images).shape == (3, 2, 4, 4)
