"""A model as a graph of ATen calls with concrete shapes: what every analysis in `raycomp.speedup` stands on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

Kind = Literal["input", "parameter", "buffer", "constant", "result"]


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the graph.

    Args:
        name: unique in the graph.
        kind: where it comes from; a "constant" is a tensor made inside `forward`.
        shape: its shape for the example input.
        tensor: the full name of the parameter or buffer, else an empty string.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    tensor: str = ""

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator.

    Args:
        name: the node's name.
        target: the operator: an `OpOverload`, or whatever else the traced graph calls.
        arguments: by the schema's names, defaults filled in; tensors are `Value`s.
        inputs: the tensors among the arguments, in order.
        outputs: what it returns, in order.
        module: the path of the innermost module whose `forward` makes the call.
        scope: that execution of the module's forward, apart from other ones.
        node: the node of the traced graph.
    """

    name: str
    target: Any
    arguments: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    module: str
    scope: str
    node: fx.Node

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def operator(self) -> str:
        """The operator's name as users see it: `aten.conv2d`."""
        if isinstance(self.target, torch._ops.OpOverload):
            return str(self.target.overloadpacket)
        return getattr(self.target, "__name__", str(self.target))

    @property
    def owner(self) -> str:
        """The path of the module that the call belongs to: the one that holds its first parameter, else `module`."""
        for value in self.inputs:
            if value.kind == "parameter":
                return value.tensor.rpartition(".")[0]
        return self.module

    @property
    def label(self) -> str:
        """How messages name the call."""
        return f"'{self.owner}' ({self.operator})" if self.owner else self.operator

    def run(self, tensors: Mapping[Value, Tensor]) -> list[Tensor]:
        """Calls the operator on other tensors instead of its inputs."""
        args, kwargs = self.bind(tensors)
        result = self.target(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else [item for item in result if isinstance(item, Tensor)]

    def bind(self, tensors: Mapping[Value, Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments with tensors instead of values."""
        given = {name: _substitute(value, tensors) for name, value in self.arguments.items()}
        schema = getattr(self.target, "_schema", None)
        if schema is None:
            keywords = {name for name in given if not name.isdigit()}
        else:
            keywords = {a.name for a in schema.arguments if a.kwarg_only}
        return [v for n, v in given.items() if n not in keywords], {n: v for n, v in given.items() if n in keywords}


@dataclass(frozen=True, eq=False)
class Graph:
    """The calls of a model in order.

    Args:
        values: all tensors.
        calls: in the order of execution.
        outputs: what the model returns, flat.
        tensors: the values of inputs, parameters, buffers and constants.
        consumers: the calls that take each value.
    """

    values: tuple[Value, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Value, ...]
    tensors: Mapping[Value, Tensor]
    consumers: Mapping[Value, Sequence[Call]]

    def state(self) -> Iterator[Value]:
        """The parameters and buffers."""
        return (value for value in self.values if value.kind in ("parameter", "buffer"))


@dataclass(frozen=True)
class Execution:
    """One run of a childless module's forward: the consecutive calls that it makes."""

    module: str
    calls: tuple[Call, ...]

    def sources(self) -> list[Value]:
        """The values that come in from outside, parameters and buffers aside."""
        made = {value for call in self.calls for value in call.outputs}
        values = dict.fromkeys(value for call in self.calls for value in call.inputs)
        return [v for v in values if v not in made and v.kind not in ("parameter", "buffer")]

    def results(self, graph: Graph) -> list[Value]:
        """The values that calls outside or the model's outputs take."""
        inside = set(self.calls)
        made = [value for call in self.calls for value in call.outputs]
        return [v for v in made if v in graph.outputs or any(c not in inside for c in graph.consumers[v])]


def executions(graph: Graph, model: nn.Module) -> list[Execution]:
    """The runs of the model's childless modules, in order."""
    childless = {name for name, module in model.named_modules() if name and not any(module.children())}
    found = []
    for (scope, module), calls in itertools.groupby(graph.calls, key=lambda call: (call.scope, call.module)):
        if scope and module in childless:
            found.append(Execution(module, tuple(calls)))
    return found


def _substitute(argument: Any, tensors: Mapping[Value, Tensor]) -> Any:
    if isinstance(argument, Value):
        return tensors[argument]
    if isinstance(argument, list):
        return [_substitute(item, tensors) for item in argument]
    return argument
