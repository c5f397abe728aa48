"""From quantizers to integers: QuantizeLinear / DequantizeLinear pairs, int8 weights and int32 biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from raycomp.deploy.int8 import graph as rewrites
from raycomp.deploy.int8.grid import Grid, stored_activation, stored_weight
from raycomp.deploy.int8.reference import DOMAIN
from raycomp.errors import SpeedupError

Array: TypeAlias = npt.NDArray[Any]

BIAS_LIMIT = 2**30
"""Half of what int32 holds: the sums of products are added to the bias in int32, too."""

_WITH_INTEGER_BIAS = ("Conv", "Gemm")


def to_qdq_(model: ir.Model) -> tuple[str, ...]:
    """Rewrites the FakeQuantize nodes of an exported model in place, until only ONNX's own operators are left.

    Returns:
        the weights whose scale had to grow, because the bias would not have fitted into int32 beside it (channels
        whose weights are nearly all zero).

    Raises:
        SpeedupError: a quantizer inside a branch or loop.
    """
    graph = model.graph
    rewrites.merge_equal_(graph)
    rewrites.raise_above_movement_(graph)
    rewrites.absorb_activations_(graph)
    rewrites.merge_equal_(graph)
    rewrites.fold_transposes_(graph)
    for node in rewrites.fake_quantizers(graph):
        x = node.inputs[0]
        assert x is not None
        constant = ir.convenience.get_const_tensor(x)
        if constant is not None:
            _store_weight(graph, node, constant.numpy())
        else:
            _store_activation(graph, node, x)
    grown = _quantize_biases(graph)
    _drop_unused(graph)
    left = [n for n in ir.traversal.RecursiveGraphIterator(graph) if n.domain == DOMAIN]
    if left:
        raise SpeedupError(
            f"{rewrites.node_target(left[0])} is quantized inside a branch or loop, which cannot be lowered",
            remedy="exclude this module from the quantizer",
        )
    model.opset_imports.pop(DOMAIN, None)
    return grown


def _store_weight(graph: ir.Graph, node: ir.Node, values: Array) -> None:
    grid, dtype = stored_weight(rewrites.node_grid(node), rewrites.kernel_axis(node))
    integers = grid.quantize(torch.from_numpy(np.array(values))).numpy().astype(dtype)
    name = rewrites.node_target(node)
    quantized = _initializer(graph, f"{name}_quantized", integers)
    dequantize = ir.Node("", "DequantizeLinear", [quantized, *_grid_values(graph, grid, dtype, name)], _axis(grid))
    graph.insert_before(node, dequantize)
    rewrites.replace(graph, node, dequantize.outputs[0])


def _store_activation(graph: ir.Graph, node: ir.Node, x: ir.Value) -> None:
    grid, dtype = stored_activation(rewrites.node_grid(node))
    name = rewrites.node_target(node)
    info = np.iinfo(dtype)
    if info.bits == 16 and (grid.quant_min, grid.quant_max) != (info.min, info.max):
        x = _clip_float(graph, node, x, grid, name)
    scale, zero_point = _grid_values(graph, grid, dtype, name)
    quantize = ir.Node("", "QuantizeLinear", [x, scale, zero_point], _axis(grid))
    quantized = quantize.outputs[0]
    graph.insert_before(node, quantize)
    # One step below the lowest number of a symmetric grid is let through: a clip would cost more than it corrects.
    if info.bits == 8 and (grid.quant_min > info.min + 1 or grid.quant_max < info.max):
        low = _initializer(graph, f"{name}_min", np.array(grid.quant_min, dtype))
        high = _initializer(graph, f"{name}_max", np.array(grid.quant_max, dtype))
        clip = ir.Node("", "Clip", [quantized, low, high])
        graph.insert_before(node, clip)
        quantized = clip.outputs[0]
    dequantize = ir.Node("", "DequantizeLinear", [quantized, scale, zero_point], _axis(grid))
    graph.insert_before(node, dequantize)
    rewrites.replace(graph, node, dequantize.outputs[0])


def _clip_float(graph: ir.Graph, node: ir.Node, x: ir.Value, grid: Grid, name: str) -> ir.Value:
    shape = [1] * (0 if x.shape is None or grid.axis is None else len(x.shape))
    if grid.axis is not None:
        shape[grid.axis] = -1
    scale, zero_point = np.array(grid.scale, np.float32), np.array(grid.zero_point, np.float32)
    for operator, limit in (("Max", grid.quant_min), ("Min", grid.quant_max)):
        bound = _initializer(graph, f"{name}_{operator.lower()}", ((limit - zero_point) * scale).reshape(shape))
        clip = ir.Node("", operator, [x, bound])
        graph.insert_before(node, clip)
        x = clip.outputs[0]
    return x


def _grid_values(graph: ir.Graph, grid: Grid, dtype: str, name: str) -> tuple[ir.Value, ir.Value]:
    scale, zero_point = np.array(grid.scale, np.float32), np.array(grid.zero_point, dtype)
    if grid.axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return _initializer(graph, f"{name}_scale", scale), _initializer(graph, f"{name}_zero_point", zero_point)


def _axis(grid: Grid) -> list[ir.Attr]:
    return [] if grid.axis is None else [ir.AttrInt64("axis", grid.axis)]


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    unique, count = name, 1
    while unique in graph.initializers:
        known = graph.initializers[unique].const_value
        if known is not None and known.numpy().tobytes() == array.tobytes() and known.numpy().dtype == array.dtype:
            return graph.initializers[unique]
        count += 1
        unique = f"{name}_{count}"
    value = ir.val(unique, const_value=ir.tensor(array, name=unique))
    graph.register_initializer(value)
    return value


@dataclass(frozen=True)
class _Biased:
    """A layer whose bias can be int32: its input and weight are dequantized from 8-bit integers."""

    node: ir.Node
    input_scale: np.float32
    weight: ir.Node
    bias: Array

    def steps(self) -> Array:
        """The bias in units of input scale times weight scale."""
        steps: Array = np.abs(self.bias) / (self.input_scale * _array(self.weight, 1))
        return steps


def _quantize_biases(graph: ir.Graph) -> tuple[str, ...]:
    layers = list(_biased_layers(graph))
    grown = tuple(name for layer in layers if (name := _make_room(layer)))
    for layer in layers:
        scale = np.broadcast_to(layer.input_scale * _array(layer.weight, 1), layer.bias.shape).astype(np.float32)
        old = layer.node.inputs[2]
        assert old is not None
        integers = _initializer(graph, f"{old.name}_quantized", np.rint(layer.bias / scale).astype(np.int32))
        scales = _initializer(graph, f"{old.name}_scale", scale)
        dequantize = ir.Node("", "DequantizeLinear", [integers, scales], [ir.AttrInt64("axis", 0)])
        graph.insert_before(layer.node, dequantize)
        layer.node.replace_input_with(2, dequantize.outputs[0])
    return grown


def _biased_layers(graph: ir.Graph) -> Iterator[_Biased]:
    for node in graph:
        if node.domain != "" or node.op_type not in _WITH_INTEGER_BIAS or len(node.inputs) < 3 or not node.inputs[2]:
            continue
        x, weight = _dequantize_before(node.inputs[0]), _dequantize_before(node.inputs[1])
        bias = _constant_of(node.inputs[2])
        if bias is None or x is None or weight is None:
            continue
        input_scale = _array(x, 1)
        if input_scale.ndim == 0 and _array(x, 2).dtype == np.uint8 and _array(weight, 0).dtype == np.int8:
            yield _Biased(node, np.float32(input_scale), weight, bias.astype(np.float32))


def _make_room(layer: _Biased) -> str | None:
    """Where the bias would overflow, gives the weight a greater scale; the name of the weight if so."""
    excess = np.maximum(layer.steps() / BIAS_LIMIT, 1).astype(np.float32)
    if not bool((excess > 1).any()):
        return None
    scale = _array(layer.weight, 1)
    factor = excess if scale.ndim else excess.max()
    quantized, zero_point = _array(layer.weight, 0), _array(layer.weight, 2)
    shape = (-1, *[1] * (quantized.ndim - 1)) if scale.ndim else ()
    centre = zero_point.astype(np.float32).reshape(shape)
    shrunk = np.rint((quantized.astype(np.float32) - centre) / factor.reshape(shape)) + centre
    _set(layer.weight, 0, shrunk.astype(quantized.dtype))
    _set(layer.weight, 1, (scale * factor).astype(np.float32))
    value = layer.weight.inputs[0]
    assert value is not None
    return str(value.name)


def _constant_of(value: ir.Value | None) -> Array | None:
    """The value of a constant, dequantized where it is stored in integers."""
    if value is None:
        return None
    dequantize = _dequantize_before(value)
    if dequantize is not None:
        quantized, scale, zero_point = (_array(dequantize, i).astype(np.float32) for i in range(3))
        return np.asarray((quantized - zero_point) * scale, np.float32)
    constant = ir.convenience.get_const_tensor(value)
    return None if constant is None else np.asarray(constant.numpy())


def _dequantize_before(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, if any."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == "DequantizeLinear" else None


def _array(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    if value is None or value.const_value is None:
        return np.array(np.nan, np.float32)
    return value.const_value.numpy()


def _set(node: ir.Node, index: int, array: Array) -> None:
    value = node.inputs[index]
    assert value is not None
    value.const_value = ir.tensor(array, name=value.name)


def _drop_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if all(not output.uses() and not output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
