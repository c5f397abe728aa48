"""Every kind of layer: masked channels go, the outputs stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.speedup.cutting import Masks, random_rows, row_masks, shapes, simulate, speed_up


def masked(gone: dict[str, list[int]], biases: bool = True) -> Callable[[nn.Module], Masks]:
    return lambda model: row_masks(model, gone, biases=biases)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions(dims: int, padding: int, bias: bool) -> None:
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]

    def factory() -> nn.Module:
        return nn.Sequential(
            conv(3, 8, 3, padding=padding, bias=bias), nn.ReLU(), conv(8, 6, 3, padding=padding, bias=bias)
        )

    model, speedup = speed_up(factory, torch.randn(2, 3, *[6] * dims).double(), masked({"0": [0, 3, 7]}))
    assert shapes(model, "0", "2") == [(5, 3, *[3] * dims), (6, 5, *[3] * dims)]
    assert (model[0].out_channels, model[2].in_channels) == (5, 5)
    assert speedup.unpruned == ()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(dims: int, groups: int) -> None:
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    transposed = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1]

    def factory() -> nn.Module:
        return nn.Sequential(conv(3, 8, 1), transposed(8, 6, 3, stride=2, groups=groups), nn.ReLU(), conv(6, 4, 1))

    def masks(model: nn.Module) -> Masks:
        found = row_masks(model, {"0": [1, 2, 5, 7]})
        columns = torch.ones_like(model[1].weight)
        columns[:, 0] = 0  # the first output of each group
        biases = torch.ones(6).double()
        biases[:: 6 // groups] = 0
        return {**found, "1": {"weight": columns, "bias": biases}}

    model, speedup = speed_up(factory, torch.randn(2, 3, *[4] * dims).double(), masks)
    assert shapes(model, "0", "1", "3")[0][0] == 4
    assert shapes(model, "1")[0][:2] == (4, (6 - groups) // groups)
    assert (model[1].in_channels, model[1].out_channels, model[1].groups) == (4, 6 - groups, groups)
    assert model[3].in_channels == 6 - groups
    assert speedup.unpruned == ()


def test_depthwise_transposed_convolution() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 16, 2, groups=8), nn.Conv2d(16, 4, 1))

    model, _ = speed_up(factory, torch.randn(2, 3, 4, 4).double(), masked({"0": [1, 2, 5], "1": [1, 2, 5]}, False))
    assert shapes(model, "0", "1", "2") == [(5, 3, 1, 1), (5, 2, 2, 2), (4, 10, 1, 1)]


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_follows_the_layer_before_it(multiplier: int) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8 * multiplier, 3, padding=1, groups=8, bias=False),
            nn.ReLU(),
            nn.Conv2d(8 * multiplier, 4, 3, padding=1),
        )

    model, speedup = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [0, 1, 6]}))
    assert shapes(model, "0", "1", "3") == [(5, 3, 3, 3), (5 * multiplier, 1, 3, 3), (4, 5 * multiplier, 3, 3)]
    assert model[1].groups == 5
    assert speedup.unpruned == ()


def test_unmasked_depthwise_with_bias_leaves_constants_that_a_pointwise_layer_takes_up() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU6(),
            nn.Conv2d(8, 4, 1, bias=False),
        )

    model, speedup = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [0, 1, 6]}))
    assert shapes(model, "0", "1", "3") == [(5, 3, 3, 3), (5, 1, 3, 3), (4, 5, 1, 1)]
    assert model[3].bias is not None
    assert speedup.plan.surgeries[0].biases[0].module == "3"


def test_masked_depthwise_frees_the_layer_before_it() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 4, 3, padding=1),
        )

    model, _ = speed_up(factory, torch.randn(2, 3, 8, 8).double(), masked({"2": [4, 5]}))
    assert shapes(model, "0", "1", "2", "3") == [(6, 3, 3, 3), (6,), (6, 1, 3, 3), (4, 6, 3, 3)]


def test_grouped_convolution_keeps_equal_groups() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )

    gone = {"0": [0, 2, 3, 6, 11], "2": [1, 4, 5]}  # three of the first and two of the second group of inputs
    model, speedup = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked(gone))
    assert shapes(model, "0", "2", "4") == [(8, 3, 1, 1), (6, 4, 3, 3), (4, 6, 1, 1)]
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (8, 6, 2)
    assert [(u.module, u.count) for u in speedup.unpruned] == [("0", 1), ("2", 1)]
    assert "equal sizes" in speedup.unpruned[0].reason


def test_whole_groups_of_a_grouped_convolution_go() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 9, 3, groups=3), nn.Conv2d(9, 4, 1))

    gone = {"0": [4, 5, 6, 7, 8], "1": [0, 3, 4, 5, 6]}
    model, _ = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked(gone))
    assert shapes(model, "0", "1", "2") == [(8, 3, 1, 1), (4, 4, 3, 3), (4, 4, 1, 1)]
    assert model[1].groups == 2


def test_linear_layers_absorb_constants() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 16),
            nn.BatchNorm1d(16),
            nn.Sigmoid(),
            nn.Linear(16, 12, bias=False),
            nn.Tanh(),
            nn.Linear(12, 3),
        )

    model, speedup = speed_up(
        factory, torch.randn(4, 5).double(), lambda m: row_masks(m, random_rows(m, ["0", "3"]), biases=False)
    )
    assert shapes(model, "0", "1", "3", "5") == [(8, 5), (8,), (6, 8), (3, 6)]
    assert (model[0].out_features, model[1].num_features, model[3].in_features) == (8, 8, 8)
    assert speedup.unpruned == ()


def test_columns_alone_free_the_layer_before() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))

    def masks(model: nn.Module) -> Masks:
        mask = torch.ones_like(model[2].weight)
        mask[:, [2, 6]] = 0
        return {"2": {"weight": mask}}

    model, _ = speed_up(factory, torch.randn(4, 5).double(), masks)
    assert shapes(model, "0", "2") == [(6, 5), (3, 6)]


def test_needs_count_live_rows_only() -> None:
    """Column 0 of the last layer but one is masked in its live rows; in row 1, which nothing needs, it isn't."""

    def factory() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    def masks(model: nn.Module) -> Masks:
        middle, last = torch.ones(4, 4).double(), torch.ones(3, 4).double()
        middle[[0, 2, 3], 0] = 0
        last[:, 1] = 0
        return {"2": {"weight": middle}, "4": {"weight": last}}

    model, _ = speed_up(factory, torch.randn(4, 5).double(), masks)
    assert shapes(model, "0", "2", "4") == [(3, 5), (3, 3), (3, 3)]


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Hardswish(),
    nn.Hardsigmoid(), nn.LeakyReLU(), nn.ELU(), nn.PReLU(), nn.PReLU(8), nn.Softplus(), nn.Mish(), nn.SELU(),
    nn.CELU(), nn.LogSigmoid(),
    nn.Hardshrink(), nn.Softshrink(), nn.Softsign(), nn.Tanhshrink(), nn.Threshold(0.1, 0.3), nn.RReLU(), nn.Dropout(),
    nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations(activation: nn.Module) -> None:
    """Channels are not zero behind the norm; the unpadded convolution takes up what they are behind the activation."""

    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 4, 3))

    model, speedup = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "0", "1", "3") == [(5, 3, 3, 3), (5,), (4, 5, 3, 3)]
    assert speedup.unpruned == ()


POOLS = [
    nn.MaxPool2d(2), nn.MaxPool2d(3, padding=1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2),
    nn.LPPool2d(2, 2), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Upsample(9, mode="bicubic"),
    nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.UpsamplingNearest2d(scale_factor=2),
]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS, ids=repr)
def test_pools_resizes_and_pads(pool: nn.Module) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), pool, nn.Conv2d(8, 4, 2))

    model, speedup = speed_up(factory, torch.randn(2, 3, 10, 10).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "0", "1", "3") == [(5, 3, 3, 3), (5,), (4, 5, 2, 2)]
    assert speedup.unpruned == ()


@pytest.mark.parametrize("dims", [1, 3])
def test_pools_and_resizes_in_other_dimensions(dims: int) -> None:
    name = f"{dims}d"
    conv, norm = getattr(nn, f"Conv{name}"), getattr(nn, f"BatchNorm{name}")
    pools = [getattr(nn, kind + name)(2) for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")]

    def factory() -> nn.Module:
        return nn.Sequential(conv(3, 8, 1), norm(8), *pools[:2], nn.Upsample(scale_factor=4), *pools[2:], conv(8, 4, 2))

    model, _ = speed_up(factory, torch.randn(2, 3, *[8] * dims).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "0", "1") == [(5, 3, *[1] * dims), (5,)]


def test_padding_with_zeros_blocks_what_is_not_zero() -> None:
    """The norm's bias makes the channel 0.5, say; a padded convolution sees 0.5 inside and 0 outside."""

    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3))

    model, speedup = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "0", "4") == [(8, 3, 3, 3), (4, 8, 3, 3)]
    assert [(u.module, u.dim, u.count) for u in speedup.unpruned] == [("0", 0, 3)]

    model, speedup = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [1, 4, 6], "1": [1, 4, 6]}))
    assert shapes(model, "0", "1", "4") == [(5, 3, 3, 3), (5,), (4, 5, 3, 3)]
    assert speedup.unpruned == ()


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_repeats_values_takes_up_constants(mode: str) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode))

    model, _ = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "0", "2") == [(5, 3, 3, 3), (4, 5, 3, 3)]


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=padding)
        )

    model, _ = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "2") == [(4, 8 if padding == "same" else 5, 3, 3)]


def test_instance_norm_makes_constants_of_its_bias() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8), nn.Conv2d(8, 4, 1)
        )

    model, _ = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "0", "1", "3") == [(5, 3, 3, 3), (5,), (4, 5, 1, 1)]
    assert (model[1].num_features, model[2].num_features) == (5, 5)


def test_group_norm_goes_in_whole_groups() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 4, 1))

    model, speedup = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"0": [0, 1, 3, 6, 7]}))
    assert shapes(model, "0", "1", "2") == [(4, 3, 3, 3), (4,), (4, 4, 1, 1)]
    assert (model[1].num_groups, model[1].num_channels) == (2, 4)
    assert [(u.module, u.count) for u in speedup.unpruned] == [("0", 1)]


def test_layer_norm_fixes_what_it_normalises() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.norm, self.fc2, self.fc3 = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc3(self.fc2(self.norm(self.fc1(x))).relu())

    model, speedup = speed_up(Net, torch.randn(4, 5).double(), masked({"fc1": [0, 1], "fc2": [3]}))
    assert shapes(model, "fc1", "fc2", "fc3") == [(8, 5), (5, 8), (3, 5)]
    assert [(u.module, u.count) for u in speedup.unpruned] == [("fc1", 2)]
    assert "'norm'" in speedup.unpruned[0].reason


def test_batch_norm_without_affine_or_statistics() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8, affine=False),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.Conv2d(8, 4, 1),
        )

    model, _ = speed_up(factory, torch.randn(8, 3, 6, 6).double(), masked({"0": [1, 4, 6]}))
    assert shapes(model, "0", "2", "3") == [(5, 3, 3, 3), (5,), (4, 5, 1, 1)]
    assert tuple(model[1].running_mean.shape) == (5,)


def test_masked_norms_alone_free_the_layer_before() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))

    model, _ = speed_up(factory, torch.randn(2, 3, 6, 6).double(), masked({"1": [0, 5]}))
    assert shapes(model, "0", "1", "3") == [(6, 3, 3, 3), (6,), (4, 6, 3, 3)]


def test_embedding_columns() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc, self.out = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.fc(self.table(tokens)).relu().mean(1))

    def masks(model: nn.Module) -> Masks:
        mask = torch.ones(11, 8).double()
        mask[:, [1, 5]] = 0
        return {"table": {"weight": mask}}

    model, _ = speed_up(Net, torch.randint(0, 11, (2, 7)), masks)
    assert shapes(model, "table", "fc") == [(11, 6), (6, 6)]
    assert model.table.embedding_dim == 6


def test_accidental_zeros_stay() -> None:
    """A norm initialised with zeros (zero-init residual) is no reason to cut: it isn't masked."""
    torch.manual_seed(0)

    def factory() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 2, 1))
        nn.init.zeros_(model[0].weight)
        return model

    model, _ = speed_up(factory, torch.randn(2, 3, 8, 8).double(), masked({"2": [0]}))
    assert shapes(model, "0", "1", "2") == [(8, 3, 3, 3), (8,), (3, 8, 3, 3)]


def test_a_whole_layer_keeps_one_channel() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    model, speedup = speed_up(factory, torch.randn(2, 3, 8, 8).double(), masked({"0": list(range(8))}))
    assert shapes(model, "0", "2") == [(1, 3, 3, 3), (4, 1, 3, 3)]
    assert [(u.count, u.reason) for u in speedup.unpruned] == [(1, "a dimension keeps at least one coordinate")]


def test_outputs_stay_whole() -> None:
    model, speedup = speed_up(lambda: nn.Linear(5, 4), torch.randn(2, 5).double(), masked({"": [1]}))
    assert model.out_features == 4
    assert speedup.unpruned[0].reason == "it reaches the model's output"


def test_float32_and_no_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    from raycomp.speedup import ModelSpeedup, verify

    masks = row_masks(model, {"0": [0, 1]})
    speedup = ModelSpeedup(model, torch.randn(1, 3, 8, 8), masks)
    smaller = speedup.speedup_model()
    assert shapes(smaller, "0", "3") == [(6, 3, 3, 3), (4, 6, 3, 3)]
    assert verify(simulate(model, masks), smaller, [torch.randn(8, 3, 8, 8)], 1e-5).passed

    unchanged = ModelSpeedup(model, torch.randn(1, 3, 8, 8), {})
    assert unchanged.speedup_model().state_dict().keys() == model.state_dict().keys()
    assert unchanged.plan.surgeries == ()


def test_resizing_by_function() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.pad(self.a(x), (1, 2, 0, 1), value=0.0)
            return self.b(functional.interpolate(x, size=(12, 12), mode="area"))

    model, _ = speed_up(Net, torch.randn(2, 3, 8, 8).double(), masked({"a": [0, 2]}))
    assert shapes(model, "a", "b") == [(6, 3, 3, 3), (4, 6, 3, 3)]
