"""Targets on a live model: inputs and outputs of every form, tied and shared modules, and no trace afterwards."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raycomp.core.attach import TargetSpace, is_wrapped, user_class
from raycomp.core.detached_copy import detached_copy
from raycomp.core.masks import apply_mask
from raycomp.core.selection import module_names, type_name
from raycomp.core.target import Target, TargetId
from raycomp.errors import CompressionError
from raycomp.pruning import L1NormPruner

Pair = namedtuple("Pair", ["left", "right"])


class Add(nn.Module):
    """What an added number shows: where a target stands."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, value: Tensor) -> Tensor:
        return value + self.amount


class Echo(nn.Module):
    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, first: Tensor, second: Tensor | None = None, *, third: Tensor | None = None) -> Any:
        return self.shape(first, second, third)


def space_with(model: nn.Module, *targets: str) -> TargetSpace:
    """Ten is added to every target."""
    space = TargetSpace(model)
    for name in targets:
        module, _, target = name.rpartition(".")
        space.target(TargetId(module, target)).add("masks", Add(10.0))
    return space


ONE, TWO, THREE = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["_input_0"], (11, 2, 3)),
        (["_input_first", "_input_1"], (11, 12, 3)),
        (["_input_second", "_input_third"], (1, 12, 13)),
        (["_input_2"], (1, 2, 13)),
    ],
)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_inputs_are_met_by_position_and_by_keyword(targets: list[str], expected: tuple, by_keyword: bool) -> None:
    model = nn.ModuleDict({"echo": Echo(lambda *given: given)})
    space_with(model, *[f"echo.{target}" for target in targets])
    arguments = {"first": ONE, "second": TWO} if by_keyword else {}
    found = model["echo"](*([] if by_keyword else [ONE, TWO]), third=THREE, **arguments)
    assert tuple(float(value) for value in found) == expected


def test_arguments_left_at_their_defaults_stay_there() -> None:
    model = nn.ModuleDict({"echo": Echo(lambda *given: given)})
    space_with(model, "echo._input_1", "echo._input_third", "echo._input_0")
    assert model["echo"](ONE) == (torch.tensor(11.0), None, None)


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        (lambda a, b, c: a, "_output_0", 11),
        (lambda a, b, c: a, "_output_1", 1),
        (lambda a, b, c: (a, b), "_output_1", (1, 12)),
        (lambda a, b, c: [a, b], "_output_0", [11, 2]),
        (lambda a, b, c: Pair(a, b), "_output_right", Pair(1, 12)),
        (lambda a, b, c: Pair(a, b), "_output_0", Pair(11, 2)),
        (lambda a, b, c: {"x": a, "y": b}, "_output_y", {"x": 1, "y": 12}),
        (lambda a, b, c: OrderedDict(x=a, y=b), "_output_0", OrderedDict(x=11, y=2)),
        (lambda a, b, c: (a, c), "_output_1", (1, None)),
        (lambda a, b, c: None, "_output_0", None),
        (lambda a, b, c: {"x": c}, "_output_x", {"x": None}),
    ],
)
def test_every_form_of_output_keeps_its_form(shape: Any, target: str, expected: Any) -> None:
    model = nn.ModuleDict({"echo": Echo(shape)})
    space_with(model, f"echo.{target}")
    found = model["echo"](ONE, TWO)
    assert found == expected
    assert type(found) is (Tensor if isinstance(expected, int) else type(expected))


def test_targets_act_in_order_factor_watch_quantize_mask_record() -> None:
    seen: list[tuple[str, float]] = []

    class Watch(nn.Module):
        def __init__(self, name: str, factor: float | None = None) -> None:
            super().__init__()
            self.name, self.factor = name, factor

        def forward(self, value: Tensor) -> Tensor | None:
            seen.append((self.name, float(value)))
            return None if self.factor is None else value * self.factor

    target = Target(TargetId("a", "_output_0"))
    target.add("recorders", Watch("recorder"))
    target.add("masks", Watch("first mask", 3.0))
    target.add("masks", Watch("second mask", 5.0))
    target.add("watchers", Watch("watcher"))
    target.set_quantizer(Watch("quantizer", 2.0), "a")
    target.add("factors", Watch("factor", 7.0))
    assert float(target(ONE)) == 210
    assert seen == [
        ("factor", 1),
        ("watcher", 7),
        ("quantizer", 7),
        ("first mask", 14),
        ("second mask", 42),
        ("recorder", 210),
    ]


def test_one_compressor_alone_can_quantize_a_target() -> None:
    target = Target(TargetId("0", "weight"))
    target.set_quantizer(Add(1), "test")
    with pytest.raises(CompressionError, match=r"0.weight: both test and other quantize this target"):
        target.set_quantizer(Add(1), "other")


def test_attaching_changes_neither_parameters_nor_names_and_detaching_leaves_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    parameters, keys = {id(p) for p in model.parameters()}, list(model.state_dict())
    space = space_with(model, "0.weight", "0.bias", "0._input_0", "1._output_0", "1.weight")
    assert {id(p) for p in model.parameters()} == parameters
    assert module_names(model) == {"": "Sequential", "0": "Conv2d", "1": "BatchNorm2d"}
    assert is_wrapped(model)
    space.detach()
    assert not is_wrapped(model)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == parameters
    assert type(model[0]) is nn.Conv2d


def test_a_class_whose_name_looks_parametrized_is_still_itself() -> None:
    class Parametrized(nn.Linear):
        pass

    class ParametrizedLinear(Parametrized):
        pass

    model = nn.Sequential(ParametrizedLinear(2, 2))
    assert type_name(model[0]) == "ParametrizedLinear"
    space_with(model, "0.weight")
    assert user_class(model[0]) is ParametrizedLinear


def test_tied_parameters_stay_tied_and_every_holder_sees_the_mask() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
    model["out"].weight = model["embed"].weight
    with torch.no_grad():
        model["embed"].weight.copy_(torch.tensor([[1.0] * 3, [4.0] * 3, [2.0] * 3, [3.0] * 3]))
    pruner = L1NormPruner(model, [{"op_names": ["out"], "sparse_ratio": 0.5}])
    pruner.compress()
    simulated = model["embed"](torch.arange(4)), model["out"](torch.ones(1, 3))
    assert simulated[0][:, 0].tolist() == [0, 4, 0, 3]
    assert simulated[1].tolist() == [[0, 12, 0, 9]]
    assert len(list(model.parameters())) == 1
    copied = copy.deepcopy(model)
    assert len(list(copied.parameters())) == 1
    pruner.unwrap_model()
    assert model["out"].weight is model["embed"].weight
    assert torch.equal(model["embed"](torch.arange(4)), simulated[0])
    assert torch.equal(model["out"](torch.ones(1, 3)), simulated[1])


def test_compressors_on_two_names_of_a_tied_parameter_meet_on_one_target() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    space = TargetSpace(model)
    assert space.target(TargetId("0", "weight")) is space.target(TargetId("1", "weight"))
    space.detach()
    assert type(model[0]) is type(model[1]) is nn.Linear
    assert model[1].weight is model[0].weight


def test_a_shared_module_is_masked_wherever_it_runs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = self.first

        def forward(self, value: Tensor) -> Tensor:
            return self.second(self.first(value))

    model = Twice()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]).compress()
    assert model(torch.ones(1, 2)).tolist() == [[0, 8]]


def test_a_hooked_sequential_has_the_users_layers_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    last = model[-1]
    space = space_with(model, "_output_0")
    assert len(model) == 3
    assert model[-1] is last
    assert list(model[1:])[-1] is last
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    plain = nn.Sequential(*model)
    assert torch.equal(model(torch.ones(1, 2)), plain(torch.ones(1, 2)) + 10)
    space.detach()
    assert type(model) is nn.Sequential


def test_copies_are_independent_of_what_they_were_copied_from() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    space = space_with(model, "0.weight", "1._output_0")
    model(torch.ones(1, 2)).sum().backward()
    copied = copy.deepcopy(model)
    value = torch.ones(1, 2)
    expected = model(value)
    space.detach()
    assert torch.equal(copied(value), expected)
    assert not torch.equal(model(value), expected)


def test_values_that_are_no_floating_point_tensors_pass() -> None:
    model = nn.Sequential(nn.Embedding(3, 2))
    space_with(model, "0._input_0")
    assert model(torch.tensor([2])).shape == (1, 2)


def test_masks_multiply_add_or_let_pass() -> None:
    value, mask = torch.tensor([2.0, 3.0]), torch.tensor([1, 0])
    assert apply_mask(value, mask, "mul").tolist() == [2, 0]
    assert apply_mask(value, mask, "add").tolist() == [2, 3 - 1000]
    assert apply_mask(value, mask, "bypass") is value


def test_a_detached_copy_is_dense_and_keeps_what_is_the_users_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "bias", Add(3.0))
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    expected = model(torch.ones(1, 2))
    space = space_with(model, "0.weight", "0._output_0")
    copied = detached_copy(model)
    assert parametrize.is_parametrized(copied[0], "bias") and not parametrize.is_parametrized(copied[0], "weight")
    assert torch.equal(copied(torch.ones(1, 2)), expected)
    assert is_wrapped(model) and not torch.equal(model(torch.ones(1, 2)), expected)
    space.detach()
    assert not is_wrapped(model) and torch.equal(model(torch.ones(1, 2)), expected)
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert not torch.equal(model(torch.ones(1, 2)), expected)


def test_ddp_is_kept_from_what_stands_on_targets_and_not_from_the_user_s_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model._ddp_params_and_buffers_to_ignore = ["1.running_var"]
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    kept = {*model._ddp_params_and_buffers_to_ignore} & dict(model.named_buffers()).keys()
    assert kept == {
        "1.running_var",
        "0.parametrizations.weight.0.masks.0.mask",
        "0.parametrizations.bias.0.masks.0.mask",
    }
    pruner.unwrap_model()
    assert model._ddp_params_and_buffers_to_ignore == ["1.running_var"]
