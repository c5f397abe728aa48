"""From a model to its graph, by `torch.export`."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from raycomp.core.parts import as_call
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, batch_size, with_batch_size
from raycomp.speedup.graph.graph import Call, Graph, Value
from raycomp.speedup.graph.inplace import functional, functional_target
from raycomp.speedup.graph.program import export


def trace(model: nn.Module, example: Example, *, training: bool = False) -> Graph:
    """The graph of a model for two samples of an example (all of them, where two can't be had).

    Two samples, so that no dimension of the batch is confused with one of size 1.

    Args:
        model: the model; it is left in the mode that is traced.
        example: an example input.
        training: whether training mode is traced, and not eval mode.

    Raises:
        SpeedupError: the model can't be exported.
    """
    model.train(training)
    pair = with_batch_size(example, 2)
    try:
        return _build(model, pair)
    except SpeedupError:
        # Copies, because one tensor given for two inputs would be traced as one input.
        whole = with_batch_size(example, batch_size(example))
        return _build(model, whole)


def _build(model: nn.Module, example: Example) -> Graph:
    program = functional(export(model, example))
    builder = _Builder(model, program)
    builder.add_placeholders(example)
    for node in program.graph.nodes:
        if node.op == "call_function":
            builder.add_call(node)
        elif node.op == "get_attr":
            builder.found[node] = operator.attrgetter(str(node.target))(program.graph_module)
        elif node.op == "output":
            leaves = pytree.tree_leaves([builder.resolve(arg) for arg in node.args])
            builder.outputs = [leaf for leaf in leaves if isinstance(leaf, Value)]
    return builder.graph()


class _Builder:
    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        self.program = program
        self.found: dict[fx.Node, Any] = {}
        self.values: list[Value] = []
        self.calls: list[Call] = []
        self.outputs: list[Value] = []
        self.tensors: dict[Value, Tensor] = {}
        self.live = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        first: dict[int, str] = {}
        for name, tensor in self.live.items():
            first.setdefault(id(tensor), name)
        self.canonical = {name: first[id(tensor)] for name, tensor in self.live.items()}
        names = {id(module): name for name, module in model.named_modules()}
        self.paths = {name: names[id(module)] for name, module in model.named_modules(remove_duplicate=False)}

    def add_placeholders(self, example: Example) -> None:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        leaves = iter(pytree.tree_leaves(as_call(example)))
        shared: dict[str, Value] = {}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            kind = specs[node.name].kind.name
            if kind == "USER_INPUT":
                leaf = next(leaves)
                self.found[node] = self.new_value(node.name, "input", leaf) if isinstance(leaf, Tensor) else leaf
            elif kind in ("PARAMETER", "BUFFER"):
                name = self.canonical[specs[node.name].target]
                if name not in shared:
                    shared[name] = self.new_value(node.name, kind.lower(), self.live[name], name)
                self.found[node] = shared[name]
            else:
                constant = self.program.constants.get(specs[node.name].target)
                is_tensor = isinstance(constant, Tensor)
                self.found[node] = self.new_value(node.name, "constant", constant) if is_tensor else constant

    def new_value(self, name: str, kind: Any, tensor: Any, full_name: str = "") -> Value:
        value = Value(name, kind, tuple(int(size) for size in tensor.shape), full_name)
        self.values.append(value)
        if kind != "result":
            self.tensors[value] = tensor.detach()
        return value

    def add_call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            self.found[node] = self.resolve(source)[index]
            return
        arguments = self._arguments(node)
        inputs = tuple(v for v in pytree.tree_leaves(dict(arguments)) if isinstance(v, Value))
        made = node.meta.get("val")
        if isinstance(made, Tensor):
            result: Any = self.new_value(node.name, "result", made)
            outputs: tuple[Value, ...] = (result,)
        elif isinstance(made, (tuple, list)):
            result = [
                self.new_value(f"{node.name}#{i}", "result", item) if isinstance(item, Tensor) else item
                for i, item in enumerate(made)
            ]
            outputs = tuple(item for item in result if isinstance(item, Value))
        else:
            self.found[node] = made
            if not inputs:
                return
            outputs = ()
            result = made
        self.found[node] = result
        scope, path = _innermost(node)
        module = self.paths.get(path, "")
        self.calls.append(Call(node.name, functional_target(node), arguments, inputs, outputs, module, scope, node))

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            given = {str(i): self.resolve(arg) for i, arg in enumerate(node.args)}
            return given | {name: self.resolve(arg) for name, arg in node.kwargs.items()}
        arguments = {}
        for i, argument in enumerate(schema.arguments):
            if i < len(node.args) and not argument.kwarg_only:
                arguments[argument.name] = self.resolve(node.args[i])
            elif argument.name in node.kwargs:
                arguments[argument.name] = self.resolve(node.kwargs[argument.name])
            else:
                arguments[argument.name] = argument.default_value
        return arguments

    def resolve(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.found[argument]
        if isinstance(argument, (list, tuple)):
            return [self.resolve(item) for item in argument]
        if isinstance(argument, dict):
            return {key: self.resolve(item) for key, item in argument.items()}
        return argument

    def graph(self) -> Graph:
        consumers: dict[Value, list[Call]] = {value: [] for value in self.values}
        for call in self.calls:
            for value in dict.fromkeys(call.inputs):
                consumers[value].append(call)
        return Graph(tuple(self.values), tuple(self.calls), tuple(self.outputs), self.tensors, consumers)


def _innermost(node: fx.Node) -> tuple[str, str]:
    """The key and the path of the innermost module execution that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [(key, str(path)) for key, (path, kind) in stack.items() if path != kind]
    return found[-1] if found else ("", "")
