"""Interpreted graphs: what a generated forward would do, without source."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

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


def test_tables_are_not_looked_up_by_numbers() -> None:
    check_call(torch.ops.aten.arange.default, (3,), {"dtype": torch.int64, "layout": None})
    for function, args, kwargs in (
        (torch.ops.aten.arange.default, (3,), {"dtype": -2}),
        (torch.ops.aten.sum.default, (X,), {"dtype": 2**31}),
        (torch.ops.aten.clone.default, (X,), {"memory_format": 4}),
        (torch.ops.aten.to.dtype, (X, 6), {}),
    ):
        with pytest.raises(SpeedupError, match=r"is no (dtype|memory_format)"):
            check_call(function, args, kwargs)


@pytest.mark.parametrize(
    "name", ["aten._reshape_alias.default", "aten.to.prim_dtype", "aten.to.prim_Device", "aten.lstm.data"]
)
def test_operators_that_reach_beyond_their_tensors_are_not_known(name: str) -> None:
    with pytest.raises(SpeedupError, match="none of the operators"):
        pure_operator(name)


def called(function: Any, *args: Any) -> Interpreted:
    graph = fx.Graph()
    root, given = nn.Module(), []
    for index, argument in enumerate(args):
        parts = argument if isinstance(argument, list) else [argument]
        nodes = []
        for number, part in enumerate(parts):
            if isinstance(part, Tensor):
                root.register_buffer(f"t{index}_{number}", part)
                part = graph.get_attr(f"t{index}_{number}")
            nodes.append(part)
        given.append(nodes if isinstance(argument, list) else nodes[0])
    graph.output(graph.call_function(function, tuple(given)))
    return interpreted(root, graph)


def test_weights_are_normed_by_lengths_of_their_own_number() -> None:
    v, g = torch.randn(3, 4), torch.rand(3, 1)
    found = called(torch.ops.aten._weight_norm.default, v, g, 0)()
    assert torch.allclose(found, v * g / v.norm(dim=1, keepdim=True))
    for odd, dim in ((torch.rand(1, 1), 0), (torch.rand(()), 0), (torch.rand(3), 0), (g, 1), (g, 7), (g.double(), 0)):
        with pytest.raises(GraphError, match="lengths of shape"):
            called(torch.ops.aten._weight_norm.default, v, odd, dim)()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "num_layers": 2, "batch_first": True}]
)
def test_recurrent_layers_run_with_weights_of_their_own_sizes_alone(kind: type[nn.RNNBase], settings: Any) -> None:
    layer, x = kind(3, 4, **settings).eval(), torch.randn(5, 2, 3)
    check_recurrent(layer, x, 4)


def test_a_projected_lstm_runs_with_weights_of_its_own_sizes_alone() -> None:
    check_recurrent(nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2).eval(), torch.randn(5, 2, 3), 2)


def check_recurrent(layer: nn.RNNBase, x: Tensor, out: int) -> None:
    function = getattr(torch.ops.aten, "rnn_tanh" if isinstance(layer, nn.RNN) else layer.mode.lower()).input
    batch = x.shape[0] if layer.batch_first else x.shape[1]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.zeros(count, batch, out)]
    if isinstance(layer, nn.LSTM):
        states.append(torch.zeros(count, batch, layer.hidden_size))
    weights = [weight.detach() for weight in layer._flat_weights]

    def run(*params: Tensor) -> Any:
        hx = states if len(states) > 1 else states[0]
        rest = (layer.bias, layer.num_layers, 0.0, False, layer.bidirectional, layer.batch_first)
        return called(function, x, hx, list(params), *rest)()

    assert torch.allclose(run(*weights)[0], layer(x)[0])
    for index in range(len(weights)):
        for odd in (weights[index][:1], weights[index].double()):
            with pytest.raises(GraphError, match="weights of"):
                run(*weights[:index], odd, *weights[index + 1 :])
    with pytest.raises(GraphError, match="weights of a recurrent layer"):
        run(*weights[:-1])


def calling(function: Any, *args: Any, **kwargs: Any) -> Interpreted:
    """A graph of one operator, whose first argument is the input."""
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), *args), kwargs))
    return interpreted(nn.Module(), graph)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["div.Tensor_mode", "div_.Scalar_mode", "divide.Scalar_mode", "divide_.Tensor_mode"])
def test_a_quotient_beyond_its_type_is_an_error_and_ends_no_process(name: str, dtype: torch.dtype) -> None:
    """-2^63 by -1: on x86 the processor itself interrupts whoever asks for it."""
    by: Any = -1 if "Scalar" in name else torch.tensor([1, -1], dtype=dtype)
    root = nn.Module()
    graph = fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("y")
    given = by if "Scalar" in name else other
    graph.output(graph.call_function(pure_operator(f"aten.{name}"), (x, given), {"rounding_mode": "trunc"}))
    model = interpreted(root, graph)
    least = torch.iinfo(dtype).min
    with pytest.raises(GraphError, match="divided by -1"):
        model(torch.tensor([7, least], dtype=dtype), torch.as_tensor(by))
    right = [-7, least] if "Tensor" in name else [-7, 8]
    found = model(torch.tensor([7, -8], dtype=dtype), torch.as_tensor(by))
    assert found.tolist() == ([7, 8] if "Tensor" in name else right)


@pytest.mark.parametrize(
    "name, args",
    [("new_empty.default", ([4096],)), ("empty_like.default", ()), ("new_empty.default", ([64, 64],))],
)
def test_memory_that_an_operator_leaves_as_it_was_is_zeros(name: str, args: tuple[Any, ...]) -> None:
    model = calling(pure_operator(f"aten.{name}"), *args)
    for _ in range(8):
        left = torch.full((4096,), 7.25)
        x = torch.ones(4096)
        del left
        assert not model(x).any()
