"""From the JSON of a `torch.export` archive to a graph that is interpreted: no source, no expression is evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from raycomp.deploy import pt2_schema as schema
from raycomp.deploy.pt2_archive import not_whole, refused
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.interpreted import Interpreted, interpreted
from raycomp.speedup.graph.operators import FUNCTIONS, check_call, is_identifier, named_function

_BLOCKS = {
    "torch.ops.higher_order.wrap_with_set_grad_enabled": "raycomp.with_grad",
    "torch.ops.higher_order.wrap_with_autocast": "raycomp.with_autocast",
    "torch.ops.higher_order.cond": "raycomp.cond",
}
_PLAIN_TEXT = re.compile(r"[\w .,:;/<>=()'\[\]*+|-]*")
_SYMBOLS = ("as_sym_int", "as_sym_float", "as_sym_bool")
_BLOCK = "raycomp_block"


InputSizes = tuple[str, Sequence[int | str]]
"""An input's name and sizes: a number, or an expression, which is the same text where sizes must be the same."""


def build_program(program: schema.Program, tensors: Mapping[str, Tensor], where: str) -> Interpreted:
    """A module that takes the program's tensors in order, and returns those that it makes, as a tuple.

    Args:
        program: the program.
        tensors: its weights, buffers and constants.
        where: the archive's name, for errors.

    Raises:
        SpeedupError: the program calls what isn't known to compute and nothing else, or contradicts itself.
    """
    try:
        return _Builder(where).build(program.graph_module, tensors)
    except SpeedupError:
        raise
    except Exception as error:  # what a graph that contradicts itself makes of torch's own classes
        raise not_whole(f"a program that can't be built: {error}", where) from error


class _Builder:
    def __init__(self, where: str) -> None:
        self.where, self.root, self.graph = where, nn.Module(), fx.Graph()
        self.made: dict[str, Any] = {}
        self.blocks = 0

    def build(self, module: schema.GraphModule, tensors: Mapping[str, Tensor]) -> Interpreted:
        graph, specs = module.graph, module.signature.input_specs
        if len(graph.inputs) != len(specs):
            raise not_whole("another number of inputs than its signature", self.where)
        for argument, spec in zip(graph.inputs, specs, strict=True):
            self._input(argument, spec, tensors)
        return self._finish(graph)

    def _input(self, argument: schema.Argument, spec: schema.InputSpec, tensors: Mapping[str, Tensor]) -> None:
        kind, given = schema.only(spec)
        if kind == "user_input" and argument.kind == "as_tensor":
            self._take(argument.value.name, self.graph.placeholder(self._checked(argument.value.name)))
        elif kind == "user_input" and argument.kind in _SYMBOLS:
            raise not_whole("a number among its inputs", self.where)
        elif kind in ("parameter", "buffer", "tensor_constant"):
            path = given.parameter_name if kind == "parameter" else None
            path = path or (given.buffer_name if kind == "buffer" else given.tensor_constant_name)
            if path not in tensors:
                raise not_whole(f"no tensor {path!r}", self.where)
            persistent = kind != "buffer" or given.persistent
            _register(self.root, path, tensors[path], persistent)
            self._take(given.arg.name, self.graph.get_attr(path))

    def _finish(self, graph: schema.Graph) -> Interpreted:
        for node in graph.nodes:
            self._call(node)
        results = [argument for argument in graph.outputs if argument.kind not in ("as_none", "as_int")]
        if any(argument.kind != "as_tensor" for argument in results):
            raise not_whole("an output that is no tensor", self.where)
        self.graph.output(tuple(self._value(argument) for argument in results))
        return interpreted(self.root, self.graph)

    def _call(self, node: schema.Node) -> None:
        function = self._function(node.target)
        self._checked(node.name or "unnamed")
        args = [self._value(item.arg) for item in node.inputs if item.kind != 2]
        kwargs = {self._checked(item.name): self._value(item.arg) for item in node.inputs if item.kind == 2}
        check_call(function, args, kwargs)
        result = self.graph.call_function(function, tuple(args), kwargs)
        outputs: list[tuple[str, Any]] = list(node.outputs)
        if len(outputs) == 1 and outputs[0][0] == "as_tensors":
            outputs = [("as_tensor", name) for name in outputs[0][1]]
        elif len(outputs) == 1 and node.target not in _BLOCKS:
            self._name_result(*outputs[0], result)
            return
        for index, (kind, output) in enumerate(outputs):
            if kind != "as_none":
                item = self.graph.call_function(FUNCTIONS["operator.getitem"], (result, index))
                self._name_result(kind, output, item)

    def _name_result(self, kind: str, output: Any, result: fx.Node) -> None:
        if kind == "as_tensor":
            self._take(output.name, result)
        elif kind in _SYMBOLS and output.as_name is not None:
            self._take(output.as_name, result)
        elif kind != "as_none":
            raise not_whole(f"a call that gives {kind}", self.where)

    def _function(self, target: str) -> Any:
        if target in _BLOCKS:
            return FUNCTIONS[_BLOCKS[target]]
        name = target.removeprefix("torch.ops.") if target.startswith("torch.ops.aten.") else target
        name = f"operator{name[9:]}" if name.startswith("_operator.") else name
        try:
            if name.startswith(("aten.", "operator.", "math.", "torch.sym_")):
                return named_function(name)
        except SpeedupError:
            pass
        raise refused(f"the operator {target[:80]!r}", self.where)

    def _value(self, argument: schema.Argument) -> Any:
        kind, value = argument
        if kind == "as_none":
            return None
        if kind == "as_tensor":
            return self._made(value.name)
        if kind == "as_tensors":
            return [self._made(item.name) for item in value]
        if kind in _SYMBOLS:
            return self._number(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._number(item) for item in value]
        if kind == "as_optional_tensor":
            return self._optional(value)
        if kind == "as_optional_tensors":
            return [self._optional(item) for item in value]
        if kind == "as_graph":
            return self._block(value.graph)
        if kind == "as_device":
            return torch.device(value.type, value.index)
        if kind == "as_complex":
            return complex(value.real, value.imag)
        tables = {
            "as_scalar_type": schema.DTYPES,
            "as_layout": schema.LAYOUTS,
            "as_memory_format": schema.MEMORY_FORMATS,
        }
        if kind in tables:
            return tables[kind][value]  # type: ignore[index]
        for text in (value,) if kind == "as_string" else value if kind == "as_strings" else ():
            if not _PLAIN_TEXT.fullmatch(text):
                raise refused(f"the text {text[:80]!r}", self.where)
        return value

    def _number(self, argument: Any) -> Any:
        kind, value = schema.only(argument)
        return self._made(value) if kind == "as_name" else value

    def _optional(self, argument: schema.OptionalTensor) -> Any:
        return None if argument.as_tensor is None else self._made(argument.as_tensor.name)

    def _block(self, graph: schema.Graph) -> fx.Node:
        inner = _Builder(self.where)
        for argument in graph.inputs:
            kind, value = argument
            name = value.name if kind == "as_tensor" else value.as_name if kind in _SYMBOLS else None
            inner._take(str(name), inner.graph.placeholder(self._checked(str(name))))
        name, self.blocks = f"{_BLOCK}_{self.blocks}", self.blocks + 1
        self.root.add_module(name, inner._finish(graph))
        return self.graph.get_attr(name)

    def _take(self, name: str, value: Any) -> None:
        if self._checked(name) in self.made:
            raise not_whole(f"two values named {name!r}", self.where)
        self.made[name] = value

    def _made(self, name: str) -> Any:
        if name not in self.made:
            raise not_whole(f"nothing that makes {name[:80]!r}", self.where)
        return self.made[name]

    def _checked(self, name: str) -> str:
        if not is_identifier(name):
            raise refused(f"the text {name[:80]!r}", self.where)
        return name


def _register(root: nn.Module, path: str, tensor: Tensor, persistent: bool) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, nn.Module())
        root = root.get_submodule(folder)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor, persistent=persistent)


def argument_names(program: schema.Program) -> list[str]:
    """The names of the arguments that torch wrote down; none where it knows none."""
    entry = next((entry for entry in program.graph_module.module_call_graph if not entry.fqn), None)
    return [] if entry is None or entry.signature is None else entry.signature.forward_arg_names or []


def input_sizes(program: schema.Program) -> list[InputSizes]:
    """The sizes that each input tensor of a program has."""
    module = program.graph_module
    names = [
        argument.value.name
        for argument, spec in zip(module.graph.inputs, module.signature.input_specs, strict=True)
        if spec.user_input is not None and argument.kind == "as_tensor"
    ]
    return [(name, _sizes(module.graph.tensor_values.get(name))) for name in names]


def _sizes(meta: schema.TensorMeta | None) -> Sequence[int | str]:
    sizes = [] if meta is None else meta.sizes
    return [size.as_expr.expr_str if size.as_expr is not None else size.as_int or 0 for size in sizes]
