"""Which channels go together, what follows them, and what can never go."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.errors import ConfigError, SpeedupError
from raycomp.pruning import L1NormPruner
from raycomp.quantization import QATQuantizer
from raycomp.speedup import (
    ModelSpeedup,
    TracedModel,
    align_followers,
    auto_set_dependency_group_ids,
    dependencies,
)
from tests.speedup.cutting import Custom, Masks, Residual, randomize_

IMAGES = torch.randn(1, 3, 8, 8)


def test_layers_that_are_added_form_one_group() -> None:
    names = ["stem", "b1.conv1", "b1.conv2", "b2.conv1", "b2.conv2", "fc"]
    found = dependencies(TracedModel.of(Residual(), IMAGES), names)
    assert [group.modules for group in found.groups] == [
        ("stem", "b1.conv2", "b2.conv2"),
        ("b1.conv1",),
        ("b2.conv1",),
        ("fc",),
    ]
    assert [group.obstacle for group in found.groups] == [None, None, None, "it reaches the model's output"]


def test_a_group_that_not_all_of_its_layers_prune_can_never_go() -> None:
    found = dependencies(TracedModel.of(Residual(), IMAGES), ["b1.conv1", "b1.conv2", "b2.conv2"])
    alone, added = found.groups
    assert alone.modules == ("b1.conv1",) and alone.obstacle is None
    assert added.modules == ("b1.conv2", "b2.conv2") and "still uses it" in str(added.obstacle)


class MobileBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.expand, self.bn1 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.project, self.bn3 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.grouped, self.bn4 = nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.bn0(self.stem(x)))
        y = functional.relu6(self.bn1(self.expand(x)))
        y = functional.relu6(self.bn2(self.depth(y)))
        x = x + self.bn3(self.project(y))
        x = functional.hardswish(self.bn4(self.grouped(x)))
        return self.fc(x.mean((2, 3)))


MOBILE = ["stem", "expand", "depth", "project", "grouped"]


def test_depthwise_goes_with_the_layer_before_it_and_groups_lose_equally() -> None:
    found = dependencies(TracedModel.of(MobileBlocks(), IMAGES), MOBILE)
    assert [(group.modules, group.blocks) for group in found.groups] == [
        (("stem", "project"), 4),
        (("expand", "depth"), 1),
        (("grouped",), 4),
    ]
    assert all(group.obstacle is None for group in found.groups)


def test_followers_are_the_norms_and_biases_behind_a_layer() -> None:
    assert dependencies(TracedModel.of(MobileBlocks(), IMAGES), MOBILE).followers == {
        "stem": ("stem.bias", "bn0.weight", "bn0.bias"),
        "expand": ("expand.bias", "bn1.weight", "bn1.bias"),
        "depth": ("depth.bias", "bn2.weight", "bn2.bias"),
        "project": ("project.bias", "bn3.weight", "bn3.bias"),
        "grouped": ("grouped.bias", "bn4.weight", "bn4.bias"),
    }


def test_a_depthwise_layer_that_is_not_asked_for_follows() -> None:
    found = dependencies(TracedModel.of(MobileBlocks(), IMAGES), ["expand"]).followers
    expected = ("expand.bias", "bn1.weight", "bn1.bias", "depth.weight", "depth.bias", "bn2.weight", "bn2.bias")
    assert found == {"expand": expected}


class PreActivation(nn.Module):
    """A norm behind an addition follows the layers before it only if they share a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.fc = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(self.bn1(x).relu())
        return self.fc(self.bn2(x).relu().mean((2, 3)))


def test_a_norm_behind_an_addition_follows_a_shared_mask() -> None:
    shared = dependencies(TracedModel.of(PreActivation(), IMAGES), ["stem", "conv"]).followers
    assert shared == {"stem": ("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"), "conv": ()}
    apart = dependencies(
        TracedModel.of(PreActivation(), IMAGES), ["stem", "conv"], {"stem": "a", "conv": "b"}
    ).followers
    assert apart == {"stem": ("bn1.weight", "bn1.bias"), "conv": ()}


def test_group_norm_asks_for_runs_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 4, 1), nn.Flatten(), nn.LazyLinear(3))
    model(IMAGES)
    group = dependencies(TracedModel.of(model, IMAGES), ["0"]).groups[0]
    assert (group.unit, group.blocks, group.obstacle) == (3, 1, None)
    entries = auto_set_dependency_group_ids(model, [{"op_names": ["0", "2"], "sparse_ratio": 0.5}], IMAGES)
    assert entries == [
        {"sparse_ratio": 0.5, "op_names": ["0"], "target_settings": {"weight": {"granularity": [3, -1, -1, -1]}}},
        {"sparse_ratio": 0.5, "op_names": ["2"]},
    ]


@pytest.mark.parametrize(
    ("model", "name", "obstacle"),
    [
        (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)), "0", "normalises over it"),
        (nn.Sequential(nn.Linear(3, 8), nn.Softmax(-1), nn.Linear(8, 2)), "0", "works along it"),
        (nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 2, 3, 1, 1)), "0", "pad"),
        (Custom(), "a", "no speedup rule for raycomp_test.twice"),
    ],
)  # fmt: skip
def test_what_can_never_go_is_told_apart(model: nn.Module, name: str, obstacle: str) -> None:
    example = torch.randn(2, 5 if name == "a" else 3)
    assert obstacle in str(dependencies(TracedModel.of(model, example), [name]).groups[0].obstacle)


def test_modules_without_channels_are_refused() -> None:
    with pytest.raises(SpeedupError, match="no weight with channels"):
        dependencies(TracedModel.of(Residual(), IMAGES), ["bn"])
    with pytest.raises(SpeedupError, match="no module 'nowhere'"):
        dependencies(TracedModel.of(Residual(), IMAGES), ["nowhere"])


def test_config_list_with_groups_and_blocks() -> None:
    entries = auto_set_dependency_group_ids(
        MobileBlocks(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "target_names": ["weight"]}], IMAGES
    )
    rest = {"sparse_ratio": 0.5, "target_names": ["weight"]}
    assert entries == [
        {
            **rest,
            "op_names": ["stem", "project"],
            "dependency_group_id": "channels of stem",
            "internal_metric_block": 4,
        },
        {**rest, "op_names": ["expand", "depth"], "dependency_group_id": "channels of expand"},
        {**rest, "op_names": ["grouped"], "dependency_group_id": "channels of grouped", "internal_metric_block": 4},
    ]


def test_config_list_leaves_what_says_otherwise() -> None:
    config: list[dict[str, Any]] = [
        {"op_names": ["stem"], "sparse_ratio": 0.5, "dependency_group_id": "mine"},
        {"op_names": ["project"], "sparse_ratio": 0.5},
        {"op_names": ["bn0"], "sparse_ratio": 0.5},
    ]
    assert auto_set_dependency_group_ids(MobileBlocks(), config, IMAGES) == [
        config[0],
        {**config[1], "dependency_group_id": "channels of project", "internal_metric_block": 4},
        {**config[2], "dependency_group_id": "channels of bn0", "internal_metric_block": 4},
    ]


def test_different_ratios_in_one_group_are_warned_of() -> None:
    config: list[dict[str, Any]] = [
        {"op_names": ["stem"], "sparse_ratio": 0.25},
        {"op_names": ["b1.conv2", "b2.conv2"], "sparse_ratio": 0.5},
    ]
    with pytest.warns(UserWarning, match=r"stem, b1\.conv2, b2\.conv2: their channels can only go together"):
        entries = auto_set_dependency_group_ids(Residual(), config, IMAGES)
    assert [entry.get("dependency_group_id") for entry in entries] == [None, None]


def test_a_layer_in_two_entries_is_refused() -> None:
    config: list[dict[str, Any]] = [
        {"op_names": ["stem"], "sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 0.25},
    ]
    for complete in (auto_set_dependency_group_ids, align_followers):
        with pytest.raises(ConfigError, match=r"stem.weight is set already by config_list\[0\]"):
            complete(MobileBlocks(), config, IMAGES)


def test_followers_in_the_config_list() -> None:
    config: list[dict[str, Any]] = [
        {"op_names": ["expand"], "sparse_ratio": 0.5},
        {"op_names": ["bn1"], "sparse_ratio": 0.25, "target_names": ["bias"]},
        {"op_names": ["grouped"], "sparse_ratio": 0.5, "target_names": ["weight"]},
    ]
    follow = {"module_name": "expand", "target_name": "weight"}
    after = {"module_name": "grouped", "target_name": "weight"}
    assert align_followers(MobileBlocks(), config, IMAGES) == [
        *config,
        {"op_names": ["bn1"], "target_names": ["weight"], "align": follow},
        {"op_names": ["depth"], "target_names": ["weight", "bias"], "align": follow},
        {"op_names": ["bn2"], "target_names": ["weight", "bias"], "align": follow},
        {"op_names": ["grouped"], "target_names": ["bias"], "align": after},
        {"op_names": ["bn4"], "target_names": ["weight", "bias"], "align": after},
    ]


class TiedHead(nn.Module):
    """A language model's head, as BERT has it: its weight is the embedding's, its bias stands in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 11))
        self.head = nn.Linear(6, 11)
        self.head.weight, self.head.bias = self.embed.weight, self.bias

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


def test_a_tied_head_is_known_by_the_name_of_its_first_owner() -> None:
    tokens = torch.tensor([[1, 2, 10], [0, 4, 4]])
    config = align_followers(TiedHead(), [{"op_types": ["Linear"], "sparse_ratio": 0.5}], tokens)
    assert config == [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    only_weights = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "target_names": ["weight"]}]
    follow = {"module_name": "head", "target_name": "weight"}
    assert align_followers(TiedHead(), only_weights, tokens)[-1] == {
        "op_names": [""],
        "target_names": ["bias"],
        "align": follow,
    }
    model = TiedHead().eval()
    pruner = L1NormPruner(model, config)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, tokens, masks)
    torch.testing.assert_close(speedup.speedup_model()(tokens), speedup.simulated(tokens))
    reasons = {item.module: item.reason for item in speedup.unpruned}
    assert reasons["head"] == "'embed' (aten.embedding) looks its rows up"


class Cached(nn.Module):
    """Returns something of a class of its own beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x), MobileBlocks()


def test_what_a_model_returns_and_no_export_knows_is_told() -> None:
    entry = [{"op_names": ["fc"], "sparse_ratio": 0.5}]
    with pytest.raises(SpeedupError, match=r"returns a MobileBlocks .*use_cache=False"):
        align_followers(Cached(), entry, torch.randn(2, 3))


def test_groups_and_followers_make_everything_go() -> None:
    """What DESIGN promises: half of the channels pruned, at most 30% of the multiplications left."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = auto_set_dependency_group_ids(MobileBlocks(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], IMAGES)
        config = align_followers(MobileBlocks(), config, IMAGES)
    torch.manual_seed(0)
    model = randomize_(MobileBlocks())
    masks = masks_by_hand(model, config)
    speedup = ModelSpeedup(model, IMAGES.double(), masks)
    small: Any = speedup.speedup_model()
    assert speedup.unpruned == ()
    kept = (small.stem, small.expand, small.depth, small.project, small.grouped)
    assert [layer.out_channels for layer in kept] == [4, 8, 8, 4, 8]  # one of three goes in each of the four groups
    dense = sum(p.numel() for p in model.parameters() if p.ndim == 4)
    assert sum(p.numel() for p in small.parameters() if p.ndim == 4) < 0.4 * dense


def masks_by_hand(model: nn.Module, config: list[dict[str, Any]]) -> Masks:
    """L1 over each group, floor(half) of each block of channels, followers aligned."""
    masks: Masks = {}
    groups: dict[str, list[str]] = {}
    blocks: dict[str, int] = {}
    for entry in config:
        if "align" not in entry:
            for name in entry["op_names"]:
                number = entry.get("dependency_group_id", name)
                groups.setdefault(number, []).append(name)
                blocks[number] = entry.get("internal_metric_block", 1)
    for number, names in groups.items():
        weights = [model.get_submodule(name).weight for name in names]
        metric = sum(weight.detach().flatten(1).abs().sum(1) for weight in weights)  # type: ignore[operator, misc, union-attr]
        keep = torch.ones(len(metric)).double()  # type: ignore[arg-type]
        for block in torch.arange(len(metric)).chunk(blocks[number]):  # type: ignore[arg-type]
            keep[block[metric[block].argsort()[: len(block) // 2]]] = 0  # type: ignore[index]
        for name in names:
            layer: Any = model.get_submodule(name)
            masks[name] = {"weight": keep.reshape(-1, 1, 1, 1).expand_as(layer.weight), "bias": keep}
    for entry in config:
        if "align" in entry:
            source = masks[entry["align"]["module_name"]]["bias"]
            for target in entry["target_names"]:
                parameter: Any = getattr(model.get_submodule(entry["op_names"][0]), target)
                mask = source.reshape(-1, *[1] * (parameter.ndim - 1)).expand_as(parameter)
                masks.setdefault(entry["op_names"][0], {})[target] = mask
    return masks


def test_compressors_on_the_model_are_ignored_and_stay() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    names = ["stem", "b1.conv1", "b1.conv2", "b2.conv2"]
    expected = dependencies(TracedModel.of(model, IMAGES), names)
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    folded = {"op_names": ["b1.conv1"], "target_names": ["weight", "_output_0"], "fuse_names": [("b1.conv1", "b1.bn1")]}
    QATQuantizer.from_compressor(pruner, [folded])
    before = model(IMAGES)
    assert dependencies(TracedModel.of(model, IMAGES), names) == expected
    assert torch.equal(model(IMAGES), before)
    assert isinstance(model.b1.conv1.weight, Tensor)
    assert "b1.conv1.parametrizations.weight.original" in model.state_dict()
