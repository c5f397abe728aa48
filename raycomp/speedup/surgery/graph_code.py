"""A forward as JSON: operators by name, layers by path. What a plan holds of it, and how a model gets it back.

The JSON may come from a stranger. It is read by a strict model, its names are held against a list of operators and
against what the model has, and the result is interpreted: no source is generated from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, JsonValue, ValidationError
from torch import fx, nn

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.interpreted import Interpreted, interpreted
from raycomp.speedup.graph.operators import check_call, is_identifier, name_of_function, named_function
from raycomp.storage.documents import Document, Many, not_a_document

CONSTANT = "raycomp_constant"
_WHERE = "plan.json"
_NAMED_VALUES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format))
}


class CannotRewriteError(Exception):
    """The traced graph has something that a rewritten forward can't hold."""


class _Constant(Document):
    shape: Many[Annotated[int, Field(ge=0, lt=2**31)]]
    dtype: str


class _Node(Document):
    op: Literal["placeholder", "get_attr", "call_function", "call_module", "output"]
    name: str
    target: str
    args: Many[JsonValue]
    kwargs: dict[str, JsonValue]


class _Graph(Document):
    nodes: Many[_Node]
    constants: dict[Annotated[str, Field(pattern=rf"^{CONSTANT}_\d+$")], _Constant]


def name_of(target: Any) -> str:
    """The name by which a plan calls a function.

    Raises:
        CannotRewriteError: it is none that a plan may call.
    """
    found = name_of_function(target)
    if found is None:
        raise CannotRewriteError(f"the graph calls {target}")
    return found


def added_tensors(text: Mapping[str, Any]) -> Iterator[list[int]]:
    """The shapes of the constants that a graph brings along."""
    return (constant.shape for constant in _read(text).constants.values())


def graph_from_json(model: nn.Module, text: Mapping[str, Any]) -> Interpreted:
    """A graph module over a cut model's layers.

    Args:
        model: the cut model.
        text: the `graph` of a plan.

    Raises:
        SpeedupError: it is no graph, or names operators or layers that aren't there.
    """
    read = _read(text)
    for name, constant in read.constants.items():
        if not hasattr(model, name):
            model.register_buffer(name, torch.zeros(constant.shape, dtype=_named_value(constant.dtype, torch.dtype)))
    module = interpreted(model, _Builder(model).build(read.nodes))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _read(text: Mapping[str, Any]) -> _Graph:
    try:
        return _Graph.model_validate(text)
    except ValidationError as error:
        raise not_a_document(error, "the graph of a plan", _WHERE, SpeedupError) from None


class _Builder:
    def __init__(self, model: nn.Module) -> None:
        self.graph = fx.Graph()
        self.made: dict[str, fx.Node] = {}
        self.layers = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
        tensors = (model.named_parameters, model.named_buffers)
        self.tensors = {name for named in tensors for name, _ in named(remove_duplicate=False)}

    def build(self, nodes: list[_Node]) -> fx.Graph:
        for node in nodes:
            if node.name in self.made:
                raise _refused(f"the node {node.name!r} comes twice")
            odd = next((name for name in node.kwargs if not is_identifier(name)), None)
            if odd is not None:
                raise _refused(f"{odd!r} is no argument's name")
            args = tuple(self._value(argument) for argument in node.args)
            kwargs = {key: self._value(argument) for key, argument in node.kwargs.items()}
            target = self._target(node)
            check_call(target, args, kwargs)
            self.made[node.name] = self.graph.create_node(node.op, target, args, kwargs, name=node.name)
        if [node.name for node in nodes if node.op == "output"] != [node.name for node in nodes[-1:]]:
            raise _refused("its last node, and no other, is the output")
        return self.graph

    def _target(self, node: _Node) -> Any:
        name = node.target
        if node.op == "call_function":
            return named_function(name)
        if node.op == "call_module" and (name not in self.layers or node.kwargs or len(node.args) != 1):
            raise _refused(f"the model has no layer {name!r}")
        if node.op == "get_attr" and name not in self.tensors:
            raise _refused(f"the model has no parameter or buffer {name!r}")
        if node.op == "placeholder" and (not is_identifier(name) or node.args or node.kwargs):
            raise _refused(f"{name!r} is no argument's name")
        if node.op == "output" and (len(node.args) != 1 or node.kwargs):
            raise _refused("the output isn't one value")
        return name

    def _value(self, argument: JsonValue) -> Any:
        if isinstance(argument, list):
            return [self._value(item) for item in argument]
        if not isinstance(argument, dict):
            return argument
        if len(argument) != 1:
            raise _refused(f"{str(argument)[:80]} is no value")
        ((kind, content),) = argument.items()
        if kind == "node" and isinstance(content, str) and content in self.made:
            return self.made[content]
        if kind == "device":
            first = next((node for node in self.made.values() if node.op == "placeholder"), None)
            if first is not None:
                return self.graph.call_function(named_function("raycomp.device"), (first,))
        if kind == "torch" and isinstance(content, str):
            return _named_value(content)
        if kind == "float" and content in ("nan", "inf", "-inf"):
            return float(content)
        if kind == "dict" and isinstance(content, dict):
            return {key: self._value(item) for key, item in content.items()}
        if kind in ("tuple", "list") and isinstance(content, list):
            items = [self._value(item) for item in content]
            return tuple(items) if kind == "tuple" else items
        raise _refused(f"{str(argument)[:80]} is no value")


def _named_value(name: str, kind: Any = object) -> Any:
    found = _NAMED_VALUES.get(name)
    if not isinstance(found, kind) or found is None:
        raise _refused(f"torch.{name[:80]} is no data type, layout or memory format")
    return found


def _refused(message: str) -> SpeedupError:
    return SpeedupError(f"the plan's graph can't be used: {message}", where=_WHERE)
