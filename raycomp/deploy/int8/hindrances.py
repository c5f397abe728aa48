"""Why a layer with integer weights is computed in float: what its integer kernel lacks, and what would give it that."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

_KERNELS = ("Conv", "Gemm", "MatMul")
_LOOKUPS = ("Gather",)
# A weight that goes through these reaches the operator that computes with it rearranged.
_MOVEMENTS = ("Concat", "Expand", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_SUFFIX = "_quantized"


def layer_of(name: str) -> str | None:
    """The layer whose integer weight a constant is; None for another constant."""
    layer, dot, parameter = name.removesuffix(_SUFFIX).rpartition(".")
    is_weight = (bool(dot) and "bias" not in parameter) or parameter == "weight"
    return layer if name.endswith(_SUFFIX) and is_weight else None


def hindrances(graph: ir.Graph) -> dict[str, str]:
    """For each layer whose integer weight meets no integer kernel of ONNX Runtime, the cause with its remedy.

    A convolution needs its input, weight and output quantized, a linear layer its input and weight, all of them to 8
    bits and the weight per tensor or output channel. Lookups of embeddings compute nothing.

    Args:
        graph: lowered, by `to_qdq_`.
    """
    found: dict[str, str] = {}
    for node in graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" and node.domain == "" else None
        layer = None if weight is None or weight.const_value is None else layer_of(weight.name or "")
        if weight is None or layer is None:
            continue
        for user in _computing(node):
            cause = None if user.op_type in _LOOKUPS else _cause(node, weight, user)
            if cause is not None:
                found[layer] = cause
    return found


def _cause(dequantize: ir.Node, weight: ir.Value, user: ir.Node) -> str | None:
    if user.op_type not in _KERNELS:
        return f"ONNX Runtime has no integer kernel for {user.op_type}: leave it out of the quantizer"
    if not any(user is each for each in _users(dequantize)):
        return (
            f"its weight reaches {user.op_type} rearranged, and no integer kernel does: leave it out of the quantizer"
        )
    if _dtype(weight) != np.int8:
        return "its weight takes 16 bits: quantize it to 8, with granularity out_channel or one scale"
    other = user.inputs[0] if user.inputs[0] is not dequantize.outputs[0] else user.inputs[1]
    before = None if other is None else other.producer()
    if before is None or before.op_type != "DequantizeLinear":
        return "its input has no scale: add `_input_` to its target_names"
    if _dtype(before.inputs[2]) != np.uint8:
        return "its input takes 16 bits: quantize it to 8, with one scale"
    if user.op_type == "Conv" and not all(each.op_type == "QuantizeLinear" for each in _users(user)):
        return "its output has no scale: add `_output_` to its target_names"
    if user.op_type == "Conv" and any(_dtype(each.inputs[2]) != np.uint8 for each in _users(user)):
        return "its output takes 16 bits: quantize it to 8, with one scale"
    return None


def _users(node: ir.Node) -> Iterator[ir.Node]:
    return (use.node for use in node.outputs[0].uses())


def _computing(node: ir.Node) -> Iterator[ir.Node]:
    """What computes with a node's output, behind what only moves it."""
    for user in _users(node):
        if user.op_type in _MOVEMENTS:
            yield from _computing(user)
        else:
            yield user


def _dtype(value: ir.Value | None) -> np.dtype[np.generic] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy().dtype
