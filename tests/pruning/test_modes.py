"""The modes of a config list on real layers: which targets are ranked, by what, and what of them is masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator, register_template
from raycomp.core import selection
from raycomp.errors import ConfigError
from raycomp.pruning import (
    ActivationMeanRankPruner,
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LAMPPruner,
    LevelPruner,
    MovementPruner,
    RandomPruner,
    SlimPruner,
    TaylorPruner,
)


class Net(nn.Module):
    """A convolution whose channels have the L1 norms that are asked for, with all that may follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([3.0, 1, 4, 2]).view(4, 1, 1, 1))
            self.conv.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(self.act(self.norm(self.conv(images))).mean((2, 3)))))


IMAGES = torch.linspace(0.5, 1.5, 8 * 25).view(8, 1, 5, 5)


def evaluator_of(model: nn.Module, rate: float = 0.01) -> TorchEvaluator:
    def train(model: Any, optimizer: Any, step: Any, schedulers: Any, max_steps: int, max_epochs: Any) -> None:
        for _ in range(max_steps):
            optimizer.zero_grad()
            step(IMAGES, model).backward()
            optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), rate)
    return TorchEvaluator(train, optimizer, lambda batch, model: model(batch).square().mean(), dummy_input=IMAGES[:2])


def made(kind: Any, *entries: dict[str, Any], model: nn.Module | None = None, **keys: Any) -> Any:
    torch.manual_seed(0)
    model = model or Net()
    return kind(model, list(entries), evaluator_of(model), **keys)


# Inputs and outputs.

RANKING = [
    (L1NormPruner, {"training_steps": 2}, lambda values: numpy.abs(values).mean((0, 2, 3))),
    (L2NormPruner, {"training_steps": 2}, lambda values: numpy.sqrt((values**2).mean((0, 2, 3)))),
    (LevelPruner, {"training_steps": 2}, lambda values: numpy.abs(values).mean((0, 2, 3))),
    (ActivationMeanRankPruner, {"training_steps": 2}, lambda values: numpy.maximum(values, 0).mean((0, 2, 3))),
]


@pytest.mark.parametrize("target", ["_input_", "_output_"])
@pytest.mark.parametrize(("kind", "keys", "of"), RANKING, ids=lambda each: getattr(each, "__name__", ""))
def test_values_are_ranked_by_what_passes_and_masked_by_channel(kind: Any, keys: Any, of: Any, target: str) -> None:
    pruner = made(kind, {"op_names": ["norm"], "target_names": [target], "sparse_ratio": 0.5}, **keys)
    model = pruner.model
    seen: list[numpy.ndarray] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            seen.append((args[0] if target == "_input_" else output).detach().double().numpy())

    # Before the masks' own hooks: what passes, unmasked.
    handle = (model.conv if target == "_input_" else model.norm).register_forward_hook(
        lambda module, args, output: note(module, (output,), output), prepend=True
    )
    pruner.compress()
    handle.remove()
    mask = pruner.get_masks()["norm"][f"{target}0"]
    assert mask.shape == (1, 4, 1, 1)
    saliency = of(numpy.concatenate(seen[:2]))
    assert mask.flatten().tolist() == [float(value >= numpy.sort(saliency)[2]) for value in saliency]
    values: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, args, output: values.append(output))
    model.eval()(IMAGES[:3])
    if target == "_output_":
        assert torch.equal(values[0].abs().amax((0, 2, 3)) > 0, mask.flatten() > 0)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (RandomPruner, {}),
        (TaylorPruner, {"training_steps": 2}),
        (MovementPruner, {"warmup_step": 0, "cooldown_begin_step": 3}),
        (LAMPPruner, {"training_steps": 2}),
    ],
)
def test_half_of_the_channels_of_outputs(kind: Any, keys: Any) -> None:
    pruner = made(kind, {"op_names": ["conv"], "target_names": ["_output_"], "sparse_ratio": 0.5}, **keys)
    pruner.compress()
    mask = pruner.get_masks()["conv"]["_output_0"]
    assert mask.numel() == 4
    assert int((mask == 0).sum()) == 2
    found: list[Tensor] = []
    pruner.model.conv.register_forward_hook(lambda module, args, output: found.append(output))
    # Any number of samples.
    pruner.model.eval()(IMAGES[:5])
    assert torch.equal(found[0].abs().amax((0, 2, 3)) > 0, mask.flatten() > 0)


@pytest.mark.parametrize("granularity", [[-1, 1, -1, -1], [-1, 1, 5, 5], [1], [[-1, 2], "back", -1], [5]])
def test_values_by_any_blocks(granularity: Any) -> None:
    entry = {"op_names": ["act"], "target_names": ["_output_"], "sparse_ratio": 0.5, "granularity": granularity}
    pruner = made(L1NormPruner, entry, training_steps=1)
    pruner.compress()
    mask = pruner.get_masks()["act"]["_output_0"]
    assert mask.shape[0] == 1 and float(mask.mean()) == 0.5
    pruner.model.eval()(IMAGES)


def test_without_an_example_values_can_t_be_ranked() -> None:
    entry = {"op_names": ["conv"], "target_names": ["_output_"], "sparse_ratio": 0.5}
    with pytest.raises(ConfigError, match="its shape isn't known without an example input"):
        L1NormPruner(Net(), [entry], training_steps=1)


def test_values_that_are_ranked_need_steps_to_be_watched() -> None:
    with pytest.raises(ConfigError, match=r"conv\._output_0 is ranked by what passes .*give training_steps"):
        made(L1NormPruner, {"op_names": ["conv"], "target_names": ["_output_"], "sparse_ratio": 0.5})


@pytest.mark.parametrize(("method", "expected"), [("mul", 0.0), ("add", -1000.0), ("bypass", None)])
def test_how_an_outputs_mask_is_applied(method: str, expected: float | None) -> None:
    entry = {"op_names": ["fc"], "target_names": ["_output_"], "sparse_ratio": 0.5, "apply_method": method}
    pruner = made(L1NormPruner, entry, training_steps=1)
    plain: list[Tensor] = []
    pruner.model.fc.register_forward_hook(lambda module, args, output: plain.append(output), prepend=True)
    seen: list[Tensor] = []
    pruner.model.fc.register_forward_hook(lambda module, args, output: seen.append(output))
    pruner.compress()
    gone = pruner.get_masks()["fc"]["_output_0"].flatten() == 0
    assert int(gone.sum()) == 3
    pruner.model.eval()(IMAGES)
    before, after = plain[-1], seen[-1]
    assert torch.equal(before[:, ~gone], after[:, ~gone])
    if expected is None:
        assert torch.equal(before, after)
    else:
        assert torch.allclose(after[:, gone], before[:, gone] * (method == "add") + expected)


def test_a_parameter_is_never_masked_by_adding() -> None:
    with pytest.raises(ConfigError, match=r"conv\.weight: add masks no parameter"):
        made(L1NormPruner, {"op_names": ["conv"], "sparse_ratio": 0.5, "apply_method": "add"})


# Parameters.


@pytest.fixture
def gate_template(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selection, "_TEMPLATES", {kind: dict(each) for kind, each in selection._TEMPLATES.items()})
    register_template("pruner", "Gate", ["scale"])
    yield


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([3.0, -1, 4, 2, 0.5]))
        self.shift = nn.Parameter(torch.arange(5.0))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.scale + self.shift


@pytest.mark.parametrize("kind", [LevelPruner, L1NormPruner, L2NormPruner])
def test_a_users_class_by_its_template(kind: Any, gate_template: None) -> None:
    masks = kind(nn.Sequential(Gate()), [{"op_types": ["Gate"], "sparse_ratio": 0.4}]).compress()[1]
    assert {target: mask.tolist() for target, mask in masks["0"].items()} == {"scale": [1, 0, 1, 1, 0]}


def test_any_parameter_by_its_name() -> None:
    entry = {"op_names": ["0"], "target_names": ["scale", "shift"], "sparse_ratio": 0.4}
    entry["target_settings"] = {"shift": {"sparse_ratio": 0.6}}
    masks = L1NormPruner(nn.Sequential(Gate()), [entry]).compress()[1]
    assert {target: mask.tolist() for target, mask in masks["0"].items()} == {
        "scale": [1, 0, 1, 1, 0],
        "shift": [0, 0, 0, 1, 1],
    }


def test_a_bias_with_a_goal_of_its_own_doesn_t_follow() -> None:
    model = Net()
    with torch.no_grad():
        model.conv.bias.copy_(torch.tensor([1.0, 2, 3, 4]))
    entry = {"op_names": ["conv"], "sparse_ratio": 0.5, "target_settings": {"bias": {"sparse_ratio": 0.25}}}
    masks = L1NormPruner(model, [entry]).compress()[1]["conv"]
    assert masks["weight"].flatten().tolist() == [1, 0, 1, 0]
    assert masks["bias"].tolist() == [0, 1, 1, 1]


SELECTIONS = [
    ({"op_types": ["Linear"]}, {"fc", "out"}),
    ({"op_types": ["Linear"], "exclude_op_names": ["out"]}, {"fc"}),
    ({"op_names_re": ["(fc|out)$"]}, {"fc", "out"}),
    ({"op_names_re": [".*"], "op_types": ["Linear", "Conv2d"], "exclude_op_names_re": ["o.*"]}, {"conv", "fc"}),
    ({"op_names": ["conv", "fc"], "exclude_op_types": ["Linear"]}, {"conv"}),
]


@pytest.mark.parametrize(("keys", "expected"), SELECTIONS)
def test_what_an_entry_selects_is_pruned_and_nothing_else(keys: dict[str, Any], expected: set[str]) -> None:
    assert made(L1NormPruner, {**keys, "sparse_ratio": 0.5}).compress()[1].keys() == expected


@pytest.mark.parametrize("kind", [L1NormPruner, L2NormPruner, FPGMPruner, LevelPruner])
def test_the_clamps_hold_for_every_layer_of_a_global_group(kind: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(0.01)
        model[2].weight.mul_(100)
    shared = {"sparse_ratio": 0.5, "global_group_id": "g"}
    entries = [
        {"op_names": ["0"], "max_sparse_ratio": 0.75, **shared},
        {"op_names": ["1"], **shared},
        {"op_names": ["2"], "min_sparse_ratio": 0.25, **shared},
    ]
    masks = kind(model, entries).compress()[1]
    gone = [1 - float(masks[str(place)]["weight"].mean()) for place in range(3)]
    # Half of all: the small one up to its most, the large one no more than its least.
    assert gone == [0.75, 0.5, 0.25]


def test_a_layer_goes_whole_where_it_is_allowed_and_is_spared_where_not() -> None:
    def gone(**keys: Any) -> float:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        with torch.no_grad():
            model[0].weight.mul_(0.01)
        entry = {"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": "g", **keys}
        return 1 - float(L1NormPruner(model, [entry]).compress()[1]["0"]["weight"].mean())

    assert gone(max_sparse_ratio=1) == 1.0
    with pytest.warns(UserWarning, match=r"0\.weight: all of it would be masked, so a block stays"):
        assert gone() == 0.75


@pytest.mark.parametrize("kind", [L1NormPruner, L2NormPruner, FPGMPruner])
def test_layers_of_a_dependency_group_share_a_mask_with_equal_blocks(kind: Any) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=4))
    shared = {"sparse_ratio": 0.5, "dependency_group_id": "d"}
    entries = [{"op_names": ["0", "1"], **shared}, {"op_names": ["2"], "internal_metric_block": 4, **shared}]
    pruner = kind(model, entries)
    saliency = [each.double().flatten().numpy() for each in pruner.saliencies().values()]
    mean = numpy.mean(saliency, axis=0).reshape(4, 2)
    expected = (mean == mean.max(axis=1, keepdims=True)).flatten()
    masks = pruner.compress()[1]
    for name in "012":
        assert masks[name]["weight"].flatten(1)[:, 0].tolist() == expected.tolist()
        assert torch.equal(masks[name]["bias"], torch.tensor(expected).float())


@pytest.mark.parametrize("zero", [True, False])
def test_layers_whose_blocks_are_all_alike_are_told_and_left(zero: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.fill_(0.0 if zero else 0.7)
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    with pytest.warns(UserWarning, match=r"L1NormPruner: 0\.weight: all saliencies are the same"):
        masks = pruner.compress()[1]
    assert [float(masks[name]["weight"].mean()) for name in "01"] == [1.0, 0.5]


# Fused.


def test_pruners_of_several_kinds_on_different_modules_in_one_training() -> None:
    torch.manual_seed(0)
    model = Net()
    first = L1NormPruner(model, [{"op_names": ["conv"], "sparse_ratio": 0.5}], evaluator_of(model))
    slim = SlimPruner.from_compressor(
        first, [{"op_names": ["norm"], "sparse_ratio": 0.25}], training_steps=5, regular_scale=0.001
    )
    taylor = TaylorPruner.from_compressor(slim, [{"op_names": ["fc"], "sparse_ratio": 0.5}], training_steps=3)
    AGPPruner(taylor, 3, 2)
    level = LevelPruner.from_compressor(taylor, [{"op_names": ["out"], "sparse_ratio": 0.5}])
    level.compress(max_steps=7)
    masks = first.chain.masks()
    gone = {name: 1 - float(masks[name]["weight"].mean()) for name in ("conv", "norm", "fc", "out")}
    assert gone == {"conv": 0.5, "norm": 0.25, "fc": 0.5, "out": 0.5}
    assert first.chain.step == 7


def test_a_goal_and_what_follows_it_from_two_entries_of_any_order() -> None:
    align = {"module_name": "conv", "target_name": "weight"}
    entries = [
        {"op_names": ["norm"], "align": align},
        {"op_names": ["fc"], "target_names": ["_input_"], "align": {**align, "module_name": "norm"}},
        {"op_names": ["conv"], "sparse_ratio": 0.5},
    ]
    for order in (entries, entries[::-1]):
        masks = made(L1NormPruner, *order).compress()[1]
        for name, target in (("conv", "bias"), ("norm", "weight"), ("norm", "bias"), ("fc", "_input_0")):
            assert masks[name][target].flatten().tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("kind", "keys", "told"),
    [
        (LevelPruner, {"mode": "balance"}, r"LevelPruner\.mode: it does not say what is balanced"),
        (LevelPruner, {"balance_gran": [4]}, r"LevelPruner\.balance_gran: .*add mode: balance"),
        (
            MovementPruner,
            {"warmup_step": 5, "cooldown_begin_step": 5},
            r"5 is not behind warmup_step, 5",
        ),
    ],
)
def test_arguments_that_a_job_file_could_not_have_together_are_refused(kind: Any, keys: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        made(kind, {"op_names": ["fc"], "sparse_ratio": 0.5}, **keys)
