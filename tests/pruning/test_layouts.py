"""Output channels are output channels, in whatever dimension of the weight or the activation they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.layout import Layout, layout_of
from raycomp.core.moments import RunContext
from raycomp.core.target import TargetId
from raycomp.pruning import AGPPruner, L1NormPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer


class Conv1D(nn.Module):
    """As transformers': a linear layer whose weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, value: Tensor) -> Tensor:
        return value @ self.weight + self.bias


def scaled(module: nn.Module, dim: int, norms: list[float], groups: int = 1) -> nn.Module:
    """Every element of output channel c is norms[c]."""
    with torch.no_grad():
        if groups == 1:
            shape = [1] * module.weight.dim()
            shape[dim] = len(norms)
            module.weight.copy_(torch.tensor(norms).view(shape).expand_as(module.weight))
        else:
            rows, per_group = module.weight.shape[0] // groups, len(norms) // groups
            for channel, norm in enumerate(norms):
                group, index = divmod(channel, per_group)
                module.weight[group * rows : (group + 1) * rows, index] = norm
        module.bias.fill_(1.0)
    return module


NORMS = [4.0, 1.0, 3.0, 2.0, 6.0, 5.0]
KEPT = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]

LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "Linear": (scaled(nn.Linear(2, 6), 0, NORMS), torch.ones(2, 2)),
    "Conv2d": (scaled(nn.Conv2d(2, 6, 1), 0, NORMS), torch.ones(2, 2, 3, 3)),
    "ConvTranspose2d": (scaled(nn.ConvTranspose2d(2, 6, 2), 1, NORMS), torch.ones(2, 2, 3, 3)),
    "ConvTranspose1d in groups": (scaled(nn.ConvTranspose1d(4, 6, 2, groups=2), 1, NORMS, 2), torch.ones(2, 4, 3)),
    "Conv1D": (scaled(Conv1D(6, 2), 1, NORMS), torch.ones(2, 5, 2)),
}


def outputs_by_channel(name: str, output: Tensor) -> Tensor:
    dim = output.dim() - 1 if name in ("Linear", "Conv1D") else 1
    return output.movedim(dim, 0).flatten(1)


@pytest.mark.parametrize("name", LAYERS)
def test_masks_hit_output_channels_and_their_bias(name: str) -> None:
    layer, value = LAYERS[name]
    model = nn.Sequential(layer)
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5, "target_names": ["weight", "bias"]}])
    masks = pruner.compress()[1]["0"]
    assert masks["bias"].tolist() == KEPT
    assert float(masks["weight"].mean()) == 0.5
    output = outputs_by_channel(name, model(value))
    assert [bool(channel.any()) for channel in output] == [bool(keep) for keep in KEPT]
    pruner.chain.space.detach()


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_norm_follows_output_channels(name: str) -> None:
    layer, value = LAYERS[name]
    norm = nn.BatchNorm2d(6) if value.dim() == 4 else nn.BatchNorm1d(6)
    model = nn.Sequential(layer, norm)
    entries = [
        {"op_names": ["0"], "sparse_ratio": 0.5, "target_names": ["weight"]},
        {"op_names": ["1"], "align": {"module_name": "0", "target_name": "weight"}},
    ]
    pruner = L1NormPruner(model, entries)
    masks = pruner.compress()[1]
    assert masks["1"]["weight"].tolist() == masks["1"]["bias"].tolist() == KEPT
    pruner.chain.space.detach()


@pytest.mark.parametrize("first", ["Conv2d", "ConvTranspose1d in groups", "ConvTranspose2d", "Conv1D"])
@pytest.mark.parametrize("second", ["Linear", "ConvTranspose1d in groups", "ConvTranspose2d"])
def test_a_dependency_group_over_layers_of_other_layouts(first: str, second: str) -> None:
    # The second one's norms turn the ranking: the sums are 5, 7, 6, 6.5, 7, 5.5.
    model = nn.ModuleDict({"a": fresh(first, NORMS), "b": fresh(second, [1.0, 6.0, 3.0, 4.5, 1.0, 0.5])})
    sizes = {name: len(model[name].weight.flatten()) // 6 for name in model}
    with torch.no_grad():
        for name in model:
            model[name].weight.div_(sizes[name])
    entries = [{"op_names": [name], "sparse_ratio": 0.5, "dependency_group_id": "d"} for name in model]
    for name in model:
        entries[0 if name == "a" else 1]["target_names"] = ["weight", "bias"]
    masks = L1NormPruner(model, entries).compress()[1]
    assert masks["a"]["bias"].tolist() == masks["b"]["bias"].tolist() == [0, 1, 0, 1, 1, 0]


def fresh(name: str, norms: list[float]) -> nn.Module:
    made: dict[str, Any] = {
        "Linear": lambda: scaled(nn.Linear(2, 6), 0, norms),
        "Conv2d": lambda: scaled(nn.Conv2d(2, 6, 1), 0, norms),
        "ConvTranspose2d": lambda: scaled(nn.ConvTranspose2d(2, 6, 2), 1, norms),
        "ConvTranspose1d in groups": lambda: scaled(nn.ConvTranspose1d(4, 6, 2, groups=2), 1, norms, 2),
        "Conv1D": lambda: scaled(Conv1D(6, 2), 1, norms),
    }
    return made[name]()


def test_masks_of_a_grouped_transposed_convolution_never_grow_back() -> None:
    model = nn.Sequential(fresh("ConvTranspose1d in groups", NORMS))
    pruner = AGPPruner(L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}]), 1, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    seen = []
    with pruner.chain.run(RunContext([optimizer])):
        for norms in (NORMS, NORMS[::-1]):
            with torch.no_grad():
                other = fresh("ConvTranspose1d in groups", norms).weight
                pruner.chain.space.parameter(TargetId("0", "weight")).copy_(other)
            optimizer.step()
            seen.append(pruner.get_masks()["0"]["bias"].tolist())
    # 7/8 of 3 is 2 channels: 1 and 3; then, in the order 5 6 2 3 1 4, the third is 4.
    assert seen == [[1, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0, 1]]


def test_input_channels_of_transposed_weights_are_their_rows() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 1, groups=2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1, 4, 2]).view(4, 1, 1).expand(4, 3, 1))
    masks = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "in_channel"}]).compress()[1]
    assert masks["0"]["weight"][:, 0, 0].tolist() == [1, 0, 1, 0]


class Behind(nn.Module):
    """A layer, and an activation that is masked with its channels; as many tokens as channels hide a wrong mask."""

    def __init__(self, kind: str = "Linear") -> None:
        super().__init__()
        self.layer = fresh(kind, NORMS)
        self.act = nn.ReLU()

    def forward(self, value: Tensor) -> Tensor:
        return self.act(self.layer(value))


@pytest.mark.parametrize("dims", [{}, {"dims": [0]}])
@pytest.mark.parametrize("example", [None, torch.ones(2, 6, 2), torch.ones(3, 5, 2)])
def test_an_activation_behind_a_linear_layer_is_masked_by_channel(example: Tensor | None, dims: dict[str, Any]) -> None:
    model = Behind()
    entries = [
        {"op_names": ["layer"], "sparse_ratio": 0.5, "target_names": ["weight"]},
        {
            "op_names": ["act"],
            "target_names": ["_output_"],
            "align": {"module_name": "layer", "target_name": "weight", **dims},
        },
    ]
    L1NormPruner(Chain(model, example), entries).chain.begin()
    for shape in ((2, 6, 2), (1, 1, 2), (4, 9, 2)):
        output = model(torch.ones(shape))
        assert output.shape == (*shape[:2], 6)
        assert [bool(output[..., channel].any()) for channel in range(6)] == [bool(keep) for keep in KEPT]
        assert bool((output[..., [0, 4, 5]] > 0).all())


@pytest.mark.parametrize("example", [None, torch.ones(2, 2, 6, 6)])
def test_an_activation_behind_a_convolution_is_masked_by_channel(example: Tensor | None) -> None:
    model = Behind("ConvTranspose2d")
    entries = [
        {"op_names": ["layer"], "sparse_ratio": 0.5, "target_names": ["weight"]},
        {
            "op_names": ["act"],
            "target_names": ["_output_"],
            "align": {"module_name": "layer", "target_name": "weight"},
        },
    ]
    pruner = L1NormPruner(Chain(model, example), entries)
    pruner.chain.begin()
    # Six columns as well as six channels.
    output = model(torch.ones(3, 2, 5, 5))
    assert output.shape == (3, 6, 6, 6)
    assert [bool(channel.any()) for channel in output.movedim(1, 0)] == [bool(keep) for keep in KEPT]
    assert pruner.get_masks()["act"]["_output_0"].shape == (1, 6, 1, 1)


def test_a_later_mask_keeps_the_rank_that_a_forward_pass_has_shown() -> None:
    model = Behind("Conv2d")
    entries = [
        {"op_names": ["layer"], "sparse_ratio": 0.5, "target_names": ["weight"]},
        {"op_names": ["act"], "target_names": ["_output_"], "align": {"module_name": "layer", "target_name": "weight"}},
    ]
    pruner = AGPPruner(L1NormPruner(model, entries), 1, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with pruner.chain.run(RunContext([optimizer])):
        for _ in range(2):
            optimizer.step()
            model(torch.ones(1, 2, 3, 3))
            shape = pruner.get_masks()["act"]["_output_0"].shape
        optimizer.step()
    assert shape == (1, 6, 1, 1)
    pruner.pruner.set_masks({}, 1.0)
    pruner.pruner.follow()
    assert pruner.get_masks()["act"]["_output_0"].shape == (1, 6, 1, 1)


@pytest.mark.parametrize("quantizer", [QATQuantizer, PtqQuantizer])
@pytest.mark.parametrize(("name", "axis"), [("Linear", 0), ("Conv2d", 0), ("ConvTranspose2d", 1), ("Conv1D", 1)])
def test_scales_by_output_channel(quantizer: type, name: str, axis: int) -> None:
    model = nn.Sequential(fresh(name, NORMS))
    entry = {"op_names": ["0"], "target_names": ["weight"], "granularity": "out_channel"}
    made = quantizer(model, [entry])
    made.chain.begin()
    with made.chain.calibrating():
        pass
    found = made.get_calibration_config()["0"]["weight"]
    assert found["axis"] == axis
    shape = [1] * model[0].weight.dim()
    shape[axis] = 6
    assert list(found["scale"].shape) == shape
    assert found["scale"].flatten().tolist() == pytest.approx([norm / 127 for norm in NORMS], rel=1e-6)
    assert torch.allclose(model[0].weight, fresh(name, NORMS).weight, rtol=1e-6)


@pytest.mark.parametrize(
    ("module", "target", "expected"),
    [
        (nn.Linear(2, 3), "weight", Layout((3, 2), 0, value_channel_dim=-1)),
        (nn.Linear(2, 3), "_output_0", Layout(None, -1, value_channel_dim=-1, is_parameter=False)),
        (nn.Conv2d(2, 3, 1), "_input_0", Layout(None, 1, value_channel_dim=1, is_parameter=False, class_rank=4)),
        (nn.ConvTranspose1d(4, 6, 1, groups=2), "weight", Layout((4, 3, 1), 1, 2, 1)),
        (nn.ConvTranspose1d(4, 6, 1, groups=2), "bias", Layout((6,), 0, value_channel_dim=1)),
        (Conv1D(3, 2), "weight", Layout((2, 3), 1, value_channel_dim=-1)),
        (nn.BatchNorm2d(3), "weight", Layout((3,), 0, value_channel_dim=1)),
        (nn.ReLU(), "_output_0", Layout(None, None, is_parameter=False)),
    ],
)
def test_layouts_by_class(module: nn.Module, target: str, expected: Layout) -> None:
    assert layout_of(nn.Sequential(module), TargetId("0", target)) == expected


def test_a_channel_dimension_is_counted_from_the_front_where_the_rank_is_known() -> None:
    assert Layout((2, 5, 7), -1, is_parameter=False).positive_channel_dim == 2
    assert Layout(None, -1, is_parameter=False, class_rank=4).positive_channel_dim == 3
    assert Layout(None, -1, is_parameter=False).positive_channel_dim == -1
    assert Layout((2, 5, 7), 1, is_parameter=False).positive_channel_dim == 1
    assert Layout((2, 5, 7), 0, is_parameter=False).positive_channel_dim == 0
    assert Layout((2, 5, 7), None, is_parameter=False).positive_channel_dim is None
