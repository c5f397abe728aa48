"""From a PyTorch module to an ONNX model whose inputs and outputs are described well enough to call it the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raycomp.core.parts import as_call
from raycomp.deploy.onnx_file import OnnxSignature, require_onnx, to_bytes
from raycomp.deploy.onnx_runtime import takes
from raycomp.deploy.sizes import ExportReport, describe_fixed
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, Tree, bind, describe, flatten, parameter_names, rebuild
from raycomp.speedup.graph.program import (
    OpenProgram,
    as_float32,
    cause_of,
    example_as_float32,
    export_program,
    quiet,
)
from raycomp.speedup.graph.recurrent import any_length, count_recurrent

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21


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

    def flat(self, example: Example) -> tuple[Tensor, ...] | None:
        """Another input's tensors; None where it has another structure."""
        args, kwargs = as_call(example)
        try:
            return tuple(flatten(self.inputs, bind(self.names, args, kwargs)))
        except TypeError:
            return None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        bound = rebuild(self.inputs, iter(tensors))
        names = list(bound)
        args = [bound[name] for name in names[: self.num_positional]]
        output = self.model(*args, **{name: bound[name] for name in names[self.num_positional :]})
        return tuple(flatten(self.outputs, output))


@dataclass(frozen=True)
class OnnxExport:
    """A model as an ONNX graph that is not a file yet.

    Args:
        graph: the graph; it may be changed before `serialized`.
        signature: how it is called.
        opened: the program that it was made from.
        names: of the inputs.
    """

    graph: ir.Model
    signature: OnnxSignature
    opened: OpenProgram
    names: tuple[str, ...]

    def serialized(self, extra: dict[str, Any]) -> tuple[bytes, tuple[str, ...]]:
        """The file's bytes, and the sizes that it takes alone though the inputs that it was exported for differ there.

        The inputs of other sizes are run in ONNX Runtime, since an operator's ONNX form may bake in what its own
        signature leaves open.

        Args:
            extra: further metadata.

        Raises:
            SpeedupError: more than the 2 GB that one ONNX file can hold.
        """
        content, fixed = to_bytes(self.graph, self.signature, extra), self.opened.fixed
        if not fixed and not all(takes(content, as_call(other)[0]) for other in self.opened.others):
            fixed = self.opened.varying
        return content, describe_fixed(fixed, self.names)


def export_to_ir(model: nn.Module, example: Example, others: Sequence[Example] = ()) -> OnnxExport:
    """Exports an eval-mode float32 CPU model through `torch.export`.

    The batch is dynamic where the model allows it, and so are the sizes in which the inputs differ.

    Raises:
        SpeedupError: the packages are missing, or the model cannot be exported.
    """
    require_onnx()
    call = _FlatCall(model, example).eval()
    opened = export_program(call, call.tensors, [flat for each in others if (flat := call.flat(each)) is not None])
    names = _tensor_names(call.inputs)
    with quiet(), any_length():
        try:
            exported = torch.onnx.export(
                opened.program,
                input_names=names,
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
    recurrent = sum(node.op_type in ("LSTM", "GRU") for node in exported.model.graph)
    if recurrent < count_recurrent(opened.program.graph):
        # Taken apart after all, they would be the shapes that `any_length` gives instead of results.
        raise SpeedupError(
            f"{type(model).__name__} cannot be exported to ONNX: onnxscript has no form for its recurrent layers",
            remedy="install a newer onnxscript",
        )
    signature = OnnxSignature(call.names, call.inputs, call.outputs, opened.dynamic_batch)
    _tidy_(exported.model, signature)
    return OnnxExport(exported.model, signature, opened, tuple(names))


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


def export_onnx(model: nn.Module, example: Example, path: str | Path, others: Sequence[Example] = ()) -> ExportReport:
    """Writes the model as float32 ONNX, open in the batch and in the sizes in which the inputs differ where it can be.

    Args:
        model: any model in any dtype on any device; a copy of it is exported in eval mode and float32.
        example: the input to trace with.
        path: the file to write.
        others: further inputs, of other lengths or image sizes.

    Raises:
        SpeedupError: the packages are missing, or the model cannot be exported.
    """
    exported = export_to_ir(as_float32(model), example_as_float32(example), [*map(example_as_float32, others)])
    content, fixed = exported.serialized({})
    Path(path).write_bytes(content)
    return ExportReport(exported.opened.dynamic_batch, fixed)
