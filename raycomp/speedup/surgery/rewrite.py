"""A rewritten forward, for models whose code states sizes as constants: view(-1, 1024), chunk, split.

The graph calls the user's own layers (so that names, classes, hooks and training behaviour stay) and states the new
sizes between them. It is part of the surgery plan, as JSON: operators by name, never code.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from raycomp.core.parts import as_call
from raycomp.speedup.graph.example import Example, Tree, describe, parameter_names, with_batch_size
from raycomp.speedup.graph.graph import Call, Execution, Graph, Value, executions
from raycomp.speedup.graph.inplace import functional, functional_target
from raycomp.speedup.graph.operators import is_identifier, named_function
from raycomp.speedup.graph.program import export_program
from raycomp.speedup.rules.base import Kept, Registry
from raycomp.speedup.surgery.graph_code import CONSTANT, CannotRewriteError, graph_from_json, name_of


def rewrite(
    live: nn.Module,
    traced: nn.Module,
    example: Example,
    graph: Graph,
    rules: Registry,
    kept: Kept,
    others: Sequence[Example] = (),
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The cut model behind a rewritten forward, and that forward as JSON.

    Args:
        live: the cut model; the result shares its layers.
        traced: the model that the graph was traced from.
        example: an example input.
        graph: the analysed graph.
        rules: the operators' rules.
        kept: what stays.
        others: further inputs: the sizes in which they differ stay open.

    Raises:
        CannotRewriteError: see there.
        SpeedupError: the model can't be exported.
    """
    program = functional(export_program(traced, example, others).program)
    pair = with_batch_size(example, 2)
    args, kwargs = as_call(pair)
    with torch.no_grad():
        tree = describe(traced(*args, **kwargs))
    writer = _Writer(live, traced, graph, rules, kept, program)
    text = writer.write(pair, tree)
    return graph_from_json(live, text), text


class _Writer:
    """Writes nodes as JSON: `{"name", "op", "target", "args", "kwargs"}`."""

    def __init__(
        self,
        live: nn.Module,
        traced: nn.Module,
        graph: Graph,
        rules: Registry,
        kept: Kept,
        program: torch.export.ExportedProgram,
    ) -> None:
        self.live, self.traced, self.graph, self.rules, self.kept, self.program = (
            live,
            traced,
            graph,
            rules,
            kept,
            program,
        )
        self.nodes: list[dict[str, Any]] = []
        self.names: dict[fx.Node, Any] = {}
        self.constants: dict[str, Any] = {}
        self.calls = self._paired()

    def write(self, example: Example, tree: Tree) -> dict[str, Any]:
        self._inputs(example)
        layers = self._layers()
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node not in self.names:
                self._call(node, layers)
        output = next(node for node in self.program.graph.nodes if node.op == "output")
        if any(spec.kind.name != "USER_OUTPUT" for spec in self.program.graph_signature.output_specs):
            raise CannotRewriteError("forward() changes buffers or inputs in place")
        results = [arg for arg in output.args[0] if isinstance(arg, fx.Node)]
        self._add("output", "output", "output", [self._structure(tree, iter(results))])
        return {"nodes": self.nodes, "constants": self.constants}

    def _paired(self) -> dict[fx.Node, Call]:
        """The analysed call behind each tensor operator of the program with a free batch size."""
        calls = [call for call in self.graph.calls if call.outputs and not _is_whole(call.node)]
        nodes = [
            node
            for node in self.program.graph.nodes
            if _makes_tensors(node) and node.target is not operator.getitem and not _is_whole(node)
        ]
        if [call.target for call in calls] != [functional_target(node) for node in nodes]:
            raise CannotRewriteError("the model runs other operators when the batch size is left open")
        return dict(zip(nodes, calls, strict=True))

    def _inputs(self, example: Example) -> None:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        given = [node for node in placeholders if specs[node.name].kind.name == "USER_INPUT"]
        leaves = iter(given)
        args, kwargs = as_call(example)
        positions = parameter_names(self.traced)
        for index, value in enumerate(args):
            name = positions[index] if index < len(positions) else f"input_{index}"
            self._input(name, value, leaves)
        for name, value in kwargs.items():
            self._input(name, value, leaves)
        state = {value.name: value.tensor for value in self.graph.state()}
        for node in placeholders:
            spec = specs[node.name]
            if node in self.names or spec.kind.name == "USER_INPUT":
                continue
            if spec.kind.name in ("PARAMETER", "BUFFER"):
                self.names[node] = ("get_attr", state.get(node.name, spec.target))
            else:
                self.names[node] = ("constant", self.program.constants.get(spec.target))

    def _input(self, name: str, value: Any, leaves: Iterator[fx.Node]) -> None:
        self._add("placeholder", name, name)
        self._take_apart({"node": name}, name, value, leaves)

    def _take_apart(self, whole: Any, name: str, value: Any, leaves: Iterator[fx.Node]) -> None:
        if isinstance(value, (tuple, list, dict)):
            for key in value if isinstance(value, dict) else range(len(value)):
                part = f"{name}_{key}"
                self._add("call_function", part, "operator.getitem", [whole, key])
                self._take_apart({"node": part}, part, value[key], leaves)
        else:
            self.names[next(leaves)] = name

    def _layers(self) -> dict[fx.Node, Execution]:
        """The calls that one call of a torch layer stands for."""
        nodes = {call: node for node, call in self.calls.items()}
        modules = dict(self.traced.named_modules())
        found = {}
        for each in executions(self.graph, self.traced):
            calls = [call for call in each.calls if call.outputs]
            whole = type(modules[each.module]).__module__.startswith("torch.nn.")
            stated = any(self.rules.find(call).sized and self._changes(call) for call in calls)
            if whole and not stated and len(each.sources()) == 1 and len(each.results(self.graph)) == 1:
                found.update({nodes[call]: each for call in calls})
        return found

    def _changes(self, call: Call) -> bool:
        values = (*call.inputs, *call.outputs)
        return any(self.kept.size(value, dim) != value.shape[dim] for value in values for dim in range(value.ndim))

    def _call(self, node: fx.Node, layers: Mapping[fx.Node, Execution]) -> None:
        if _is_whole(node):
            self.names[node] = self._reference(node.args[0])  # type: ignore[arg-type]
            return
        if node in layers:
            self._call_layer(node, layers)
            return
        if node.target is operator.getitem and node.args[0] in layers:
            return
        if node in self.calls:
            call = self.calls[node]
            target, args, kwargs = self._resized(call, node) if self._changes(call) else (None, node.args, node.kwargs)
        elif not node.users:
            return
        else:
            target, args, kwargs = None, node.args, node.kwargs
        name = self._add(
            "call_function",
            node.name,
            target or name_of(functional_target(node)),
            self._json(list(args)),
            self._json(dict(kwargs)),
        )
        self.names[node] = name

    def _call_layer(self, node: fx.Node, layers: Mapping[fx.Node, Execution]) -> None:
        execution = layers[node]
        own = [n for n, each in layers.items() if each is execution]
        if node is not own[-1]:
            return
        source, result = execution.sources()[0], execution.results(self.graph)[0]
        name = self._add("call_module", node.name, execution.module, [self._of_value(source)])
        for each in (*own, *(user for n in own for user in n.users if user.target is operator.getitem)):
            self.names[each] = name
        if result not in self.calls[node].outputs:
            raise CannotRewriteError(f"'{execution.module}' gives a value from within itself")

    def _of_value(self, value: Value) -> Any:
        """The written node that holds a value."""
        for call in self.graph.calls:
            if value in call.outputs and _is_whole(call.node):
                return self._of_value(call.inputs[0])
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name == value.name:
                return self._json(node)
            made = self.calls.get(node)
            if made is not None and value in made.outputs:
                if node.meta.get("val") is not None and isinstance(node.meta["val"], Tensor):
                    return self._json(node)
                index = int(value.name.rpartition("#")[2])
                return self._json(next(user for user in node.users if user.args[1] == index))
        raise CannotRewriteError(f"nothing makes {value.name}")

    def _resized(self, call: Call, node: fx.Node) -> tuple[str | None, list[Any], dict[str, Any]]:
        rule = self.rules.find(call)
        changed = rule.resize(call, self.kept)
        schema = node.target._schema  # type: ignore[union-attr]
        present = _by_name(schema, node.args, node.kwargs)
        operator_name = rule.resized_operator if changed and rule.resized_operator else None
        if operator_name is not None:
            schema = named_function(operator_name)._schema  # type: ignore[attr-defined]
        merged = {**present, **{k: _merge(present.get(k), call.arguments.get(k), v) for k, v in changed.items()}}
        args = [merged[a.name] for a in schema.arguments if not a.kwarg_only and a.name in merged]
        kwargs = {a.name: merged[a.name] for a in schema.arguments if a.kwarg_only and a.name in merged}
        return operator_name, args, kwargs

    def _add(self, op: str, name: str, target: str, args: Any = (), kwargs: Any = None) -> str:
        self.nodes.append({"op": op, "name": name, "target": target, "args": list(args), "kwargs": dict(kwargs or {})})
        return name

    def _json(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return {"node": self._reference(argument)}
        if isinstance(argument, (list, tuple)):
            return [self._json(item) for item in argument]
        if isinstance(argument, dict):
            return {key: self._json(item) for key, item in argument.items()}
        if isinstance(argument, torch.device):
            return {"device": True}
        for kind in (torch.dtype, torch.layout, torch.memory_format):
            if isinstance(argument, kind):
                return {"torch": str(argument).removeprefix("torch.")}
        if isinstance(argument, float) and (argument != argument or abs(argument) == float("inf")):
            return {"float": str(argument)}
        if argument is None or isinstance(argument, (bool, int, float, str)):
            return argument
        raise CannotRewriteError(f"an operator takes a {type(argument).__name__}")

    def _reference(self, node: fx.Node) -> str:
        found = self.names.get(node)
        if found is None:
            raise CannotRewriteError(f"{node.name} is taken from within a layer")
        if isinstance(found, str):
            return found
        kind, what = found
        if kind == "get_attr":
            self.names[node] = self._add("get_attr", node.name, what)
        else:
            self.names[node] = self._add("get_attr", node.name, self._constant(what))
        return node.name

    def _constant(self, tensor: Any) -> str:
        if not isinstance(tensor, Tensor):
            raise CannotRewriteError("forward() uses an object that isn't a tensor")
        name = f"{CONSTANT}_{len(self.constants)}"
        self.constants[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        self.live.register_buffer(name, tensor.detach().clone())
        return name

    def _structure(self, tree: Tree, results: Iterator[fx.Node]) -> Any:
        kind = tree["kind"]
        if kind == "tensor":
            return self._json(next(results))
        if kind == "constant":
            return tree["value"]
        if kind == "dict":
            items = {key: self._structure(item, results) for key, item in tree["items"].items()}
            if tree["attributes"]:
                if not all(map(is_identifier, items)):
                    raise CannotRewriteError("the model's outputs have names that can't be attributes")
                name = self._add("call_function", "outputs", "raycomp.outputs", (), items)
                return {"node": name}
            return {"dict": items}
        if "fields" in tree:
            raise CannotRewriteError("the model returns a named tuple")
        return {kind: [self._structure(item, results) for item in tree["items"]]}


def _makes_tensors(node: fx.Node) -> bool:
    made = node.meta.get("val") if node.op == "call_function" else None
    return isinstance(made, Tensor) or (isinstance(made, (tuple, list)) and any(isinstance(m, Tensor) for m in made))


def _is_whole(node: fx.Node) -> bool:
    """Whether a node slices all of a dimension: exports with a free batch size have more of them."""
    if str(node.target) != "aten.slice.Tensor":
        return False
    given = _by_name(node.target._schema, node.args, node.kwargs)  # type: ignore[union-attr]
    start, end, step = given.get("start"), given.get("end"), given.get("step", 1)
    return start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= sys.maxsize))


def _by_name(schema: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    return {**dict(zip(positional, args, strict=False)), **kwargs}


def _merge(present: Any, old: Any, new: Any) -> Any:
    """New sizes for old ones; what is left open (-1, a size of the batch) stays open."""
    if isinstance(new, list) and isinstance(present, (list, tuple)) and len(new) == len(present):
        before = old if isinstance(old, list) else list(present)
        return [_merge(p, o, n) for p, o, n in zip(present, before, new, strict=True)]
    return present if isinstance(present, fx.Node) or present == -1 or new == old else new
