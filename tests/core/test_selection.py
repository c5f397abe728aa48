"""Which modules and targets a config list means, and what it is told when it means none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raycomp.config import parse_config_list
from raycomp.core import selection
from raycomp.core.selection import register_template, resolve
from raycomp.errors import ConfigError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, images: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.fc(self.norm(self.conv2(self.conv1(images))).mean((2, 3))) * scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


def chosen(kind: str, *entries: dict, model: nn.Module | None = None) -> list[str]:
    resolved = resolve(model or Block(), kind, parse_config_list(kind, entries), "list")
    return [str(target) for target in resolved.selected]


def problems(kind: str, *entries: dict, model: nn.Module | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        chosen(kind, *entries, model=model)
    return [str(problem) for problem in raised.value.problems]


def prune(**keys: object) -> dict:
    return {"sparse_ratio": 0.5, "target_names": ["weight"], **keys}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"op_types": ["Conv2d"]}, ["conv1", "conv2"]),
        ({"op_names": ["fc", "conv1"]}, ["conv1", "fc"]),
        ({"op_names_re": [r"conv\d"]}, ["conv1", "conv2"]),
        ({"op_names_re": ["conv"]}, ["conv1", "conv2"]),
        ({"op_names_re": ["conv1|conv$"]}, ["conv1"]),
        ({"op_names": ["fc"], "op_names_re": [r"conv\d"]}, ["conv1", "conv2", "fc"]),
        ({"op_names": ["fc", "conv1"], "op_types": ["Conv2d"]}, ["conv1"]),
        ({"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["conv1"]}, ["conv2", "fc"]),
        ({"op_types": ["Conv2d", "Linear"], "exclude_op_types": ["Conv2d"]}, ["fc"]),
        ({"op_types": ["Conv2d", "Linear"], "exclude_op_names_re": [".*1"]}, ["conv2", "fc"]),
    ],
)
def test_selection_is_names_and_types_without_what_is_excluded(keys: dict, expected: list[str]) -> None:
    assert chosen("pruner", prune(**keys)) == [f"{name}.weight" for name in expected]


def test_without_target_names_the_template_of_the_class_counts() -> None:
    assert chosen("pruner", {"op_types": ["Conv2d"], "sparse_ratio": 0.5}) == [
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
    ]
    assert chosen("quantizer", {"op_names": ["fc"]}) == ["fc._input_0", "fc.weight", "fc.bias", "fc._output_0"]
    assert chosen("distiller", {"op_names": ["norm"]}) == ["norm._output_0"]


def test_short_target_names_mean_the_first_input_and_output() -> None:
    assert chosen("quantizer", {"op_names": ["fc"], "target_names": ["_input_", "_output_"]}) == [
        "fc._input_0",
        "fc._output_0",
    ]


def test_a_class_of_the_user_gets_a_template_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selection._TEMPLATES, "pruner", dict(selection._TEMPLATES["pruner"]))
    model = nn.Sequential(Scaled())
    assert "Scaled has no pruner targets by default" in problems("pruner", prune_all(), model=model)[0]
    register_template("pruner", "Scaled", ["gain"])
    assert chosen("pruner", prune_all(), model=model) == ["0.gain"]
    with pytest.raises(ValueError, match="Scaled already has"):
        register_template("pruner", "Scaled", ["gain"])


def prune_all() -> dict:
    return {"op_types": ["Scaled"], "sparse_ratio": 0.5}


def test_all_mistakes_come_at_once_with_their_place_and_the_nearest_name() -> None:
    assert problems(
        "pruner",
        prune(op_names=["cnv1"]),
        prune(op_types=["conv2d"]),
        prune(op_names_re=["onv"]),
        prune(op_types=["Linear"], exclude_op_names=["fc2"]),
        prune(op_names=["conv1"], op_types=["Linear"]),
        {"op_names": ["conv1"], "sparse_ratio": 0.5, "target_names": ["wight"]},
    ) == [
        "list[0].op_names: the model has no module 'cnv1' (did you mean 'conv1'?)",
        "list[1].op_types: no module is of type 'conv2d' (did you mean 'Conv2d'?)",
        "list[2].op_names_re: 'onv' matches no module (the pattern must match a module's name from its beginning)",
        "list[3].exclude_op_names: the model has no module 'fc2' (did you mean 'fc'?)",
        "list[4]: the entry selects no module (its keys exclude one another for this model)",
        "list[5].target_names: conv1 (Conv2d) has no parameter 'wight' (did you mean 'weight'?)",
    ]


def test_a_target_set_twice_is_refused() -> None:
    (problem,) = problems("pruner", prune(op_types=["Conv2d"]), prune(op_names=["conv2"]))
    assert problem == "list[1]: conv2.weight is set already by list[0] (exclude it in one)"


def test_an_argument_that_forward_lacks_is_refused() -> None:
    whole = nn.Sequential(Block())
    assert chosen("quantizer", {"op_names": ["0"], "target_names": ["_input_images"]}, model=whole) == [
        "0._input_images"
    ]
    (problem,) = problems("quantizer", {"op_names": ["0"], "target_names": ["_input_image"]}, model=whole)
    assert problem == "list[0].target_names: 0 (Block): forward has no argument 'image' (did you mean 'images'?)"


def test_the_second_name_of_a_shared_module_is_explained() -> None:
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    assert problems("pruner", prune(op_names=["second"]), model=model) == [
        "list[0].op_names: 'second' is the same module as 'first' (name 'first')"
    ]


def test_two_names_of_a_tied_parameter_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert problems("pruner", prune(op_types=["Linear"]), model=model) == [
        "list[0]: 1.weight and 0.weight are one tied parameter (exclude one of them; the other holds for both)"
    ]


@pytest.mark.parametrize("name", [f"{kind}{dim}d" for kind in ("Conv", "ConvTranspose") for dim in (1, 2, 3)])
def test_every_convolution_has_default_targets(name: str) -> None:
    model = nn.Sequential(getattr(nn, name)(1, 1, 1))
    assert chosen("pruner", {"op_types": [name], "sparse_ratio": 0.5}, model=model) == ["0.weight", "0.bias"]
    targets = ["0._input_0", "0.weight", "0.bias", "0._output_0"]
    assert chosen("quantizer", {"op_types": [name]}, model=model) == targets
