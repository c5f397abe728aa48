"""From a PyTorch module to an ONNX model whose inputs and outputs are described well enough to call it the same way."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raycomp.core.parts import as_call
from raycomp.deploy.versions import versions
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, Tree, bind, describe, flatten, parameter_names, rebuild
from raycomp.speedup.graph.program import as_float32, cause_of, example_as_float32, export_program, quiet

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
        self.tensors = tuple(flatten(self.inputs, bound))
        with torch.no_grad():
            self.outputs = describe(model(*args, **kwargs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        bound = rebuild(self.inputs, iter(tensors))
        names = list(bound)
        args = [bound[name] for name in names[: self.num_positional]]
        output = self.model(*args, **{name: bound[name] for name in names[self.num_positional :]})
        return tuple(flatten(self.outputs, output))


def export_to_ir(model: nn.Module, example: Example) -> tuple[ir.Model, OnnxSignature]:
    """Exports an eval-mode float32 CPU model through `torch.export`; the batch is dynamic where the model allows it.

    Raises:
        SpeedupError: the packages are missing, or the model cannot be exported.
    """
    require_onnx()
    call = _FlatCall(model, example).eval()
    program, dynamic = export_program(call, call.tensors)
    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                input_names=_tensor_names(call.inputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=True,
            )
        except Exception as error:
            raise SpeedupError(
                f"{type(model).__name__} cannot be exported to ONNX: {cause_of(error)}",
                remedy="an operator has no ONNX form, or the model's control flow depends on its data",
            ) from error
    assert exported is not None
    signature = OnnxSignature(call.names, call.inputs, call.outputs, dynamic)
    _tidy_(exported.model, signature)
    return exported.model, signature


def _tensor_names(tree: Tree, prefix: str = "") -> list[str]:
    if tree["kind"] == "tensor":
        return [prefix]
    if tree["kind"] == "constant":
        return []
    items = tree["items"]
    pairs = items.items() if tree["kind"] == "dict" else enumerate(items)
    return [name for key, item in pairs for name in _tensor_names(item, f"{prefix}.{key}" if prefix else str(key))]


def _tidy_(model: ir.Model, signature: OnnxSignature) -> None:
    """The names that the user's model gives, and no traces of the machine that exported."""
    for name, value in list(model.graph.initializers.items()):
        own = name.removeprefix("model.").replace("parametrizations.", "").removesuffix(".original")
        if own != name and own not in model.graph.initializers:
            value.name = own
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for output, name in zip(model.graph.outputs, _tensor_names(signature.outputs, "output"), strict=True):
        output.name = name
    model.metadata_props.clear()


def to_bytes(model: ir.Model, signature: OnnxSignature, extra: dict[str, Any]) -> bytes:
    """The serialized model, with its signature, the libraries' versions and `extra` in its metadata.

    Raises:
        SpeedupError: more than the 2 GB that one ONNX file can hold.
    """
    import onnx_ir as ir

    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                # Runtimes infer them; in a small model they weigh more than they tell.
                output.type, output.shape = None, None
    described = {"signature": asdict(signature), "versions": versions(), **extra}
    model.metadata_props[METADATA_KEY] = json.dumps(described)
    model.producer_name = "raycomp"
    try:
        serialized: bytes = ir.to_proto(model).SerializeToString()
    except ValueError as error:
        raise SpeedupError(f"the model does not fit into one ONNX file: {cause_of(error)}") from error
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
