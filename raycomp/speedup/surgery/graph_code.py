"""A forward as JSON: operators by name, layers by path. What a plan holds of it, and how a model gets it back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Outputs


class CannotRewriteError(Exception):
    """The traced graph has something that a rewritten forward can't hold."""


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
    },
    "raycomp.outputs": Outputs,
}


def name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, function in _FUNCTIONS.items():
        if function is target:
            return name
    raise CannotRewriteError(f"the graph calls {target}")


def named_operator(name: str) -> Any:
    """The function that a plan names.

    Raises:
        SpeedupError: it isn't an operator that is registered in this process.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        raise SpeedupError(f"the plan calls the operator {name}, which isn't there", remedy="import its library first")
    return found


def graph_from_json(model: nn.Module, text: Mapping[str, Any]) -> fx.GraphModule:
    """A graph module over a cut model's layers.

    Args:
        model: the cut model.
        text: the `graph` of a plan.

    Raises:
        SpeedupError: the plan names operators or layers that aren't there.
    """
    for name, constant in text["constants"].items():
        if not hasattr(model, name):
            model.register_buffer(name, torch.zeros(constant["shape"], dtype=getattr(torch, constant["dtype"])))
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def value(argument: Any) -> Any:
        if isinstance(argument, list):
            return [value(item) for item in argument]
        if not isinstance(argument, Mapping):
            return argument
        ((kind, content),) = argument.items()
        if kind == "node":
            return made[content]
        if kind == "device":
            first = next(node for node in made.values() if node.op == "placeholder")
            return graph.call_function(getattr, (first, "device"))
        if kind == "torch":
            return getattr(torch, content)
        if kind == "float":
            return float(content)
        if kind == "dict":
            return {key: value(item) for key, item in content.items()}
        items = [value(item) for item in content]
        return tuple(items) if kind == "tuple" else items

    for node in text["nodes"]:
        target = named_operator(node["target"]) if node["op"] == "call_function" else node["target"]
        args = tuple(value(argument) for argument in node["args"])
        kwargs = {key: value(argument) for key, argument in node["kwargs"].items()}
        made[node["name"]] = graph.create_node(node["op"], target, args, kwargs, name=node["name"])
    graph.lint()
    module = fx.GraphModule(model, graph, class_name=type(model).__name__)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
