"""An ONNX file that raycomp wrote: what stands in its metadata, so that it can be called like the float model."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raycomp.deploy.versions import versions
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Tree
from raycomp.speedup.graph.program import cause_of

if TYPE_CHECKING:
    import onnx_ir as ir

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
