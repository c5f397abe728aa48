"""From a PyTorch module to an ONNX model whose inputs and outputs are described well enough to call it the same way."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from raycomp.errors import SpeedupError
from raycomp.speedup.call import (
    Example,
    Tree,
    as_call,
    batch_size,
    bind,
    describe,
    flatten,
    is_batched,
    parameter_names,
    rebuild,
    with_batch_size,
)

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21
METADATA_KEY = "raycomp"
_EXTRA = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxSignature:
    """How the exported model was called, as it travels in the file's metadata.

    Args:
        parameters: names of `forward`'s positional parameters, in order.
        inputs: description of the arguments by name.
        outputs: description of what the model returns.
        dynamic_batch: whether any batch size can be run; else only that of the example.
    """

    parameters: tuple[str, ...]
    inputs: Tree
    outputs: Tree
    dynamic_batch: bool


def require_onnx() -> None:
    """Checks that the packages of the `int8` extra are installed.

    Raises:
        SpeedupError: one of them is missing; the remedy says what to install.
    """
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SpeedupError(
                f"ONNX export and int8 need {name}, which cannot be imported: {error}",
                remedy="pip install 'raycomp[int8]'",
            ) from error


def versions() -> dict[str, str]:
    """The versions of the packages that decide what an exported file looks like."""
    installed = {}
    for name in ("raycomp", "torch", *_EXTRA):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


class _FlatCall(nn.Module):
    """The model as a function from a flat list of tensors to a flat list of tensors."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        args, kwargs = as_call(example)
        self.num_positional = len(args)
        self.names = parameter_names(model)
        bound = bind(self.names, args, kwargs)
        self.inputs = describe(bound)
        self.tensors = flatten(self.inputs, bound)
        self.outputs: Tree = {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        bound = rebuild(self.inputs, iter(tensors))
        names = list(bound)
        args = [bound[name] for name in names[: self.num_positional]]
        output = self.model(*args, **{name: bound[name] for name in names[self.num_positional :]})
        self.outputs = describe(output)
        return tuple(flatten(self.outputs, output))


def export_to_ir(model: nn.Module, example: Example) -> tuple[ir.Model, OnnxSignature]:
    """Exports an eval-mode float32 CPU model through `torch.export`; the batch is dynamic where the model allows it.

    Raises:
        SpeedupError: the packages are missing, or the model cannot be exported.
    """
    require_onnx()
    example = with_batch_size(example, max(2, batch_size(example)))
    call = _FlatCall(model, example).eval()
    program, dynamic = export_program(call, tuple(call.tensors))
    with torch.no_grad():
        call(*call.tensors)  # tracing may have left the description of a traced output
    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                input_names=_input_names(call.inputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=True,
            )
        except Exception as error:
            raise SpeedupError(
                f"{type(model).__name__} cannot be exported to ONNX: {_first_line(error)}",
                remedy="an operator has no ONNX form, or the model's control flow depends on its data",
            ) from error
    assert exported is not None
    signature = OnnxSignature(call.names, call.inputs, call.outputs, dynamic)
    _tidy_(exported.model, signature)
    return exported.model, signature


def export_program(model: nn.Module, example: Example) -> tuple[ExportedProgram, bool]:
    """`torch.export` with a dynamic batch if the model allows it: the program, and whether it does.

    Raises:
        SpeedupError: the model cannot be exported at all.
    """
    args, kwargs = as_call(example)
    size = batch_size(example)

    def dims(leaf: Any) -> Any:
        return {0: Dim.AUTO} if is_batched(leaf, size) else None

    shapes = torch.utils._pytree.tree_map(dims, (list(args), kwargs))
    try:
        program = _export(model, args, kwargs, _by_name(model, *shapes))
    except Exception:  # noqa: BLE001  # whatever keeps the batch from being dynamic: a static export is tried next
        program = None
    if program is not None:
        return program, _has_dynamic_batch(program)
    try:
        return _export(model, args, kwargs, None), False
    except Exception as error:
        raise SpeedupError(
            f"{type(model).__name__} cannot be exported: {_first_line(error)}",
            remedy="torch.export needs a forward whose control flow does not depend on the data",
        ) from error


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: dict[str, Any] | None
) -> ExportedProgram:
    with quiet(), torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def _by_name(model: nn.Module, positional: list[Any], named: dict[str, Any]) -> dict[str, Any]:
    if isinstance(model, _FlatCall):
        return {"tensors": tuple(positional)}
    return bind(parameter_names(model), tuple(positional), named)


def _has_dynamic_batch(program: ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    values = [node.meta["val"] for node in placeholders if isinstance(node.meta.get("val"), Tensor)]
    return any(isinstance(value.shape[0], torch.SymInt) for value in values if value.ndim)


def _input_names(tree: Tree, prefix: str = "") -> list[str]:
    if tree["kind"] == "tensor":
        return [prefix]
    if tree["kind"] == "constant":
        return []
    items = tree["items"]
    pairs = items.items() if tree["kind"] == "dict" else enumerate(items)
    return [name for key, item in pairs for name in _input_names(item, f"{prefix}.{key}" if prefix else str(key))]


def _tidy_(model: ir.Model, signature: OnnxSignature) -> None:
    """The names that the user's model gives, and no traces of the machine that exported."""
    for name, value in list(model.graph.initializers.items()):
        plain = name.removeprefix("model.").replace("parametrizations.", "").removesuffix(".original")
        if plain != name and plain not in model.graph.initializers:
            value.name = plain
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for output, name in zip(model.graph.outputs, _input_names(signature.outputs, "output"), strict=True):
        output.name = name
    model.metadata_props.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' own warnings and log lines away from users; errors still raise."""
    names = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def to_bytes(model: ir.Model, signature: OnnxSignature, extra: dict[str, Any]) -> bytes:
    """The serialized model, with its signature, the libraries' versions and `extra` in its metadata.

    Raises:
        SpeedupError: more than the 2 GB that one ONNX file can hold.
    """
    import onnx_ir as ir

    described = {
        "signature": {
            "parameters": list(signature.parameters),
            "inputs": signature.inputs,
            "outputs": signature.outputs,
            "dynamic_batch": signature.dynamic_batch,
        },
        "versions": versions(),
    }
    model.metadata_props[METADATA_KEY] = json.dumps(described | extra)
    model.producer_name = "raycomp"
    try:
        serialized: bytes = ir.to_proto(model).SerializeToString()
    except ValueError as error:
        raise SpeedupError(f"the model does not fit into one ONNX file: {_first_line(error)}") from error
    return serialized


def export_onnx(model: nn.Module, example: Example, path: str | Path) -> OnnxSignature:
    """Writes the model as float32 ONNX, with a dynamic batch where it allows one.

    Args:
        model: any model in any dtype on any device; a copy of it is exported in eval mode and float32.
        example: the input to trace with.
        path: the file to write.

    Raises:
        SpeedupError: the packages are missing, or the model cannot be exported.
    """
    graph, signature = export_to_ir(as_float32(model), example_as_float32(example))
    Path(path).write_bytes(to_bytes(graph, signature, {}))
    return signature


def as_float32(model: nn.Module) -> nn.Module:
    """A copy of the model on the CPU, in float32 and eval mode."""
    import copy

    return copy.deepcopy(model).cpu().float().eval()


def example_as_float32(example: Example) -> Example:
    """The example on the CPU, its floating-point tensors in float32."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().cpu().float() if leaf.is_floating_point() else leaf.detach().cpu()

    if isinstance(example, Tensor):
        return convert(example)  # type: ignore[no-any-return]
    return torch.utils._pytree.tree_map(convert, example)  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
