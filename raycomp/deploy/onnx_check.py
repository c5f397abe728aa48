"""What an ONNX file may hold before ONNX Runtime opens it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from raycomp.errors import SpeedupError

_STANDARD = ("", "ai.onnx")
_ENDLESS = ("Loop", "Scan", "SequenceMap")


def check_onnx(content: bytes, where: str) -> None:
    """Passes a model of standard operators that run once each, with all its constants in the file.

    Args:
        content: the file.
        where: its name, for errors.

    Raises:
        SpeedupError: it is no ONNX model, or names other files, libraries, functions of its own, or loops.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise SpeedupError(f"ONNX Runtime cannot load the model: {error}", where=where) from error
    if model.functions or model.training_info:
        raise _refused("functions of its own", where)
    odd = sorted({entry.domain for entry in model.opset_import} - set(_STANDARD))
    if odd:
        raise _refused(f"operators of the library {odd[0][:80]!r}", where)
    for graph in _graphs(model.graph):
        if graph.sparse_initializer:
            raise _refused("sparse constants", where)
        for tensor in graph.initializer:
            _check_constant(tensor, where)
        odd_name = next((name for name in _names(graph) if not name.isprintable()), None)
        if odd_name is not None:
            raise _refused(f"the name {odd_name[:80]!r}", where)
        for node in graph.node:
            if node.domain not in _STANDARD or node.op_type in _ENDLESS:
                raise _refused(f"the operator {node.op_type[:80]!r}", where)
            for attribute in node.attribute:
                for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])):
                    _check_constant(tensor, where)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _names(graph: Any) -> Iterator[str]:
    """All texts of a graph, which ONNX Runtime's errors quote."""
    yield graph.name
    for node in graph.node:
        yield from (node.name, node.op_type, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            yield from (text.decode(errors="replace") for text in (attribute.s, *attribute.strings))
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    yield from (tensor.name for tensor in graph.initializer)


def _check_constant(tensor: Any, where: str) -> None:
    if tensor.data_location or tensor.external_data:
        raise _refused(f"a constant in another file ({tensor.name[:80]!r})", where)
    # Four bits are the least that an element takes.
    if min(tensor.dims, default=1) < 0 or math.prod(tensor.dims) > 2 * tensor.ByteSize():
        raise _refused(
            f"a constant {tensor.name[:80]!r} of the shape {list(tensor.dims)[:8]}, whose values are missing", where
        )


def _refused(what: str, where: str) -> SpeedupError:
    return SpeedupError(
        f"refused to load this ONNX model: it holds {what}",
        where=where,
        remedy="raycomp opens models that it exported itself: one file, standard operators",
    )
