"""A graph as a module that runs node by node: no source is generated from it, so nothing in it can become code."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.operators import as_run, name_of_function, named_function
from raycomp.speedup.graph.result_bytes import Allowance, is_traced
from raycomp.speedup.graph.shapes import Check, check_of

_READ_FROM_GRAPH = ("_graph", "_steps", "_inputs", "_output", "_allowance")


@dataclass(frozen=True)
class _Slot:
    """Where a value stands among those made so far."""

    index: int


@dataclass(frozen=True)
class _Nest:
    """A container with slots in it."""

    value: Any


@dataclass(frozen=True)
class _Step:
    """One call.

    Args:
        name: the node's.
        function: what is called; for a layer or a tensor of the module its path, in parts.
        run: what is run in the function's place.
        kind: the node's `op`.
        args, kwargs: with slots for values.
        result: the slot for the result.
        over: slots that no later step reads.
        check: what an operator that trusts sizes is given goes through first.
    """

    name: str
    function: Any
    run: Any
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int
    over: tuple[int, ...]
    check: Check | None


class GraphError(SpeedupError, RuntimeError):
    """An operator of a stored graph refuses what it is given: the input, or the graph, is not right."""


class Interpreted(fx.GraphModule):
    """A graph module whose graph is interpreted. `recompile()` takes over what was changed in `graph`."""

    def recompile(self) -> Any:
        """Reads the graph anew."""
        self._steps, self._inputs, self._output = _steps(self._graph)
        self._allowance = Allowance()
        # Each instance has a class of its own.
        type(self).forward = _forward(self._inputs)  # type: ignore[method-assign]
        # torch.compile looks for these maps of generated lines.
        self._lineno_map: dict[int, int | None] = {}
        self._prologue_start = 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph: what `forward` does.

        Raises:
            TypeError: other arguments than the graph has inputs.
            GraphError: an operator refuses what it is given.
            SpeedupError: a step would make a tensor out of all proportion to the weights and inputs.
        """
        values = [*self._bound(args, kwargs), *(None for _ in self._steps)]
        measure = self._allowance.of(values[: len(self._inputs)], self)
        for step in self._steps:
            if step.kind == "get_attr":
                values[step.result] = _found(self, step.function)
                continue
            given = [_filled(argument, values) for argument in step.args]
            named = {name: _filled(argument, values) for name, argument in step.kwargs.items()} if step.kwargs else {}
            if step.kind == "call_function":
                try:
                    if step.check is not None:
                        step.check(given, named)
                    if measure is not None:
                        measure.step(step.function, given, named, step.name)
                    values[step.result] = step.run(*given, **named)
                except Exception as error:
                    if _is_of_others(error):
                        raise
                    raise _told(error, step) from error
            else:
                values[step.result] = _found(self, step.function)(*given, **named)
            for slot in step.over:
                values[slot] = None
        if measure is not None:
            self._allowance.keep(measure)
        return _filled(self._output, values)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        names = self._inputs
        if len(args) > len(names):
            raise TypeError(f"forward() takes {len(names)} arguments, and {len(args)} were given")
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        if set(bound) != set(names) or len(bound) != len(args) + len(kwargs):
            given = [*names[: len(args)], *kwargs]
            raise TypeError(f"forward() takes {', '.join(names)}, each once, and got {', '.join(given) or 'none'}")
        return [bound[name] for name in names]

    def __reduce__(self) -> tuple[Any, ...]:
        parts = {name: value for name, value in self.__dict__.items() if name not in _READ_FROM_GRAPH}
        return _unpickled, (parts, _nodes(self._graph))


def interpreted(root: nn.Module, graph: fx.Graph) -> Interpreted:
    """The graph over the layers, parameters and buffers of a module."""
    return Interpreted(root, graph, class_name=type(root).__name__)


def _forward(inputs: tuple[str, ...]) -> Any:
    """A forward that says what it takes; a signature is data, not source."""

    def forward(self: Interpreted, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *inputs)]
    forward.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
    return forward


def _is_of_others(error: Exception) -> bool:
    """Whether someone waits for this very error: those who trace a model, or look for free memory."""
    return isinstance(error, (SpeedupError, torch.OutOfMemoryError)) or is_traced()


def _told(error: Exception, step: _Step) -> GraphError:
    cause = next(iter(str(error).splitlines()), type(error).__name__)
    return GraphError(f"{name_of_function(step.function)} cannot run what it is given: {cause}", where=step.name)


def _steps(graph: fx.Graph) -> tuple[tuple[_Step, ...], tuple[str, ...], Any]:
    nodes = list(graph.nodes)
    inputs = tuple(str(node.target) for node in nodes if node.op == "placeholder")
    calls = [node for node in nodes if node.op not in ("placeholder", "output")]
    order = [*(node for node in nodes if node.op == "placeholder"), *calls]
    slots = {node: _Slot(index) for index, node in enumerate(order)}
    output = next((node for node in nodes if node.op == "output"), None)
    kept = set() if output is None else set(output.all_input_nodes)
    last: dict[fx.Node, list[int]] = {}
    for node in order:
        readers = [user for user in node.users if user in slots]
        if node not in kept:
            last.setdefault(max(readers, key=lambda user: slots[user].index, default=node), []).append(
                slots[node].index
            )
    steps = tuple(
        _Step(
            node.name,
            node.target if node.op == "call_function" else tuple(str(node.target).split(".")),
            as_run(node.target),
            node.op,
            tuple(_template(argument, slots) for argument in node.args),
            {key: _template(argument, slots) for key, argument in node.kwargs.items()},
            slots[node].index,
            tuple(last.get(node, ())),
            check_of(node.target),
        )
        for node in calls
    )
    return steps, inputs, None if output is None else _template(output.args[0], slots)


def _found(module: Any, path: tuple[str, ...]) -> Any:
    """A layer, parameter or buffer; by dict where it is plain, which is many times faster than by attribute."""
    for part in path[:-1]:
        module = module._modules[part]
    last = path[-1]
    found = module._parameters.get(last)
    return getattr(module, last) if found is None else found


def _template(argument: Any, slots: dict[fx.Node, _Slot]) -> Any:
    if isinstance(argument, fx.Node):
        return slots[argument]
    if isinstance(argument, tuple):
        found: Any = tuple(_template(item, slots) for item in argument)
    elif isinstance(argument, list):
        found = [_template(item, slots) for item in argument]
    elif isinstance(argument, dict):
        found = {key: _template(item, slots) for key, item in argument.items()}
    else:
        return argument
    # A list that a caller gets, or an operator keeps, must not be the graph's own.
    return _Nest(found)


def _filled(argument: Any, values: list[Any]) -> Any:
    kind = type(argument)
    if kind is _Slot:
        return values[argument.index]
    if kind is not _Nest:
        return argument
    inside = argument.value
    if isinstance(inside, dict):
        return {key: _filled(item, values) for key, item in inside.items()}
    items = [_filled(item, values) for item in inside]
    return tuple(items) if isinstance(inside, tuple) else items


class _Reference(str):
    """A node's name, where a pickle stands for a node."""


def _nodes(graph: fx.Graph) -> list[tuple[str, str, str, Any, Any]]:
    """The graph as plain data: functions by name, nodes by theirs."""

    def name(node: fx.Node) -> str:
        if node.op != "call_function":
            return str(node.target)
        found = name_of_function(node.target)
        if found is None:
            raise SpeedupError(f"a graph that calls {node.target} can't be pickled")
        return found

    def plain(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: _Reference(node.name))

    return [(node.op, node.name, name(node), plain(node.args), plain(node.kwargs)) for node in graph.nodes]


def _unpickled(parts: dict[str, Any], nodes: list[tuple[str, str, str, Any, Any]]) -> Interpreted:
    graph, made = fx.Graph(), dict[str, fx.Node]()

    def live(argument: Any) -> Any:
        if isinstance(argument, _Reference):
            return made[str(argument)]
        if isinstance(argument, (list, tuple)):
            return type(argument)(live(item) for item in argument)
        return {key: live(item) for key, item in argument.items()} if isinstance(argument, dict) else argument

    for op, name, target, args, kwargs in nodes:
        function: Any = named_function(target) if op == "call_function" else target
        made[name] = graph.create_node(op, function, live(tuple(args)), live(dict(kwargs)), name=name)
    root = nn.Module()
    root.__dict__.update(parts)
    return interpreted(root, graph)
