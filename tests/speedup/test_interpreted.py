"""Interpreted graphs: what a generated forward would do, without source."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import fx, nn

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.interpreted import GraphError, Interpreted, interpreted
from raycomp.speedup.graph.operators import check_call, is_identifier, named_function, pure_operator
from raycomp.speedup.graph.program import cause_of


def module() -> Interpreted:
    """relu(x W^T + b) * scale."""
    torch.manual_seed(0)
    root = nn.Module()
    root.fc = nn.Linear(3, 2)
    root.register_buffer("scale", torch.tensor([2.0, 3.0]))
    graph = fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(torch.ops.aten.relu.default, (graph.call_module("fc", (x,)),))
    graph.output({"y": graph.call_function(torch.ops.aten.mul.Tensor, (relu, graph.get_attr("scale")))})
    return interpreted(root, graph)


X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 2.0]])


def expected(model: nn.Module) -> torch.Tensor:
    return torch.relu(X @ model.fc.weight.T + model.fc.bias) * torch.tensor([2.0, 3.0])  # type: ignore[union-attr, operator]


def test_it_runs_copies_travels_exports_compiles_and_trains() -> None:
    model = module()
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    right = expected(model)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(each(X)["y"], right) and torch.allclose(each(x=X)["y"], right)
        assert list(each.state_dict()) == ["scale", "fc.weight", "fc.bias"]
    assert torch.allclose(torch.export.export(model, (X,)).module()(X)["y"], right)
    assert torch.allclose(torch.compile(model, backend="eager")(X)["y"], right)
    model(X)["y"].sum().backward()
    assert model.fc.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_a_copy_has_weights_and_steps_of_its_own() -> None:
    model = module()
    other = copy.deepcopy(model)
    other.fc = nn.Linear(3, 2)
    assert not torch.allclose(other(X)["y"], model(X)["y"]) and torch.allclose(model(X)["y"], expected(model))


def test_a_changed_graph_is_taken_over_by_recompile() -> None:
    model = module()
    node = next(node for node in model.graph.nodes if node.target is torch.ops.aten.relu.default)
    node.target = torch.ops.aten.neg.default
    model.recompile()
    assert torch.allclose(model(X)["y"], -(X @ model.fc.weight.T + model.fc.bias) * model.scale)  # type: ignore[union-attr, operator]


def test_other_arguments_and_other_sizes_are_told() -> None:
    model = module()
    for args, kwargs in (((), {}), ((X, X), {}), ((X,), {"x": X}), ((), {"z": X})):
        with pytest.raises(TypeError, match=r"forward\(\) takes"):
            model(*args, **kwargs)
    model.scale = torch.ones(7)
    with pytest.raises(GraphError, match=r"aten\.mul\.Tensor cannot run") as caught:
        model(X)
    assert cause_of(caught.value).startswith("RuntimeError")


def test_a_tracer_gets_the_error_that_it_waits_for() -> None:
    model = module()
    model.scale = torch.ones(7)
    with pytest.raises(Exception, match="broadcast") as caught:
        torch.export.export(model, (X,), strict=False)
    assert not isinstance(caught.value, GraphError)
    assert cause_of(caught.value).startswith("RuntimeError")


@pytest.mark.parametrize(
    "name",
    [
        *("aten.from_file.default", "aten.save.default", "aten.set_.source_Storage", "aten.resize_.default"),
        *("aten.add.out", "aten.add.str", "aten.mul.left_t", "aten.add.__class__", "aten.__class__", "aten.relu_.out"),
        *("prim.Print", "mylib.run", "aten", "aten.relu.default.x", "torch.ops.aten.relu", "os.system", ""),
    ],
)
def test_operators_that_do_more_than_compute_are_not_known(name: str) -> None:
    with pytest.raises(SpeedupError, match="none of the operators"):
        pure_operator(name)


def test_operators_that_compute_are_known() -> None:
    assert pure_operator("aten.relu_") is torch.ops.aten.relu_.default
    assert pure_operator("aten.__and__.Tensor") is torch.ops.aten.__and__.Tensor
    assert pure_operator("aten.max_pool2d") is torch.ops.aten.max_pool2d.default


def test_a_call_fits_its_operator() -> None:
    check_call(torch.ops.aten.add.Tensor, (1, 2), {"alpha": 3})
    for args, kwargs in (((1,), {}), ((1, 2, 3), {}), ((1, 2), {"beta": 3}), ((1, 2), {"other": 3})):
        with pytest.raises(SpeedupError, match="is called with"):
            check_call(torch.ops.aten.add.Tensor, args, kwargs)


def test_arithmetic_takes_numbers_and_stays_in_64_bits() -> None:
    assert named_function("operator.mul")(6, 7) == 42 and named_function("torch.sym_sum")([1, 2, 3]) == 6
    for name, values in (
        ("operator.mul", ("a", 10**12)),
        ("operator.mul", ([1], 10**12)),
        ("operator.pow", (10, 10**8)),
        ("operator.mul", (2**40, 2**40)),
        ("operator.getitem", (nn.Linear(1, 1), "__class__")),
    ):
        with pytest.raises((TypeError, ValueError)):
            named_function(name)(*values)


def test_identifiers() -> None:
    assert all(map(is_identifier, ("x", "input_0", "_a", "p_conv_weight")))
    assert not any(map(is_identifier, ("", "x=1", "1x", "lambda", "__class__", "a b", "a.b", "é", "x\n")))
