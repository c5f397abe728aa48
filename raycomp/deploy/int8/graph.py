"""Rewrites of an exported graph before its quantizers become integers: fewer of them, and where kernels look for them.

A `FakeQuantize` node rounds and clamps, which no monotone function disturbs. So none of these rewrites changes a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from raycomp.deploy.int8.grid import Grid
from raycomp.deploy.int8.reference import DOMAIN, FAKE_QUANTIZE

_MOVEMENT = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")


def fake_quantizers(graph: ir.Graph) -> Iterator[ir.Node]:
    """The graph's FakeQuantize nodes."""
    return (node for node in list(graph) if is_fake_quantize(node))


def is_fake_quantize(node: ir.Node | None) -> bool:
    """Whether the node is a FakeQuantize."""
    return node is not None and node.domain == DOMAIN and node.op_type == FAKE_QUANTIZE


def node_grid(node: ir.Node) -> Grid:
    """The grid that a FakeQuantize node's attribute holds."""
    return Grid.from_text(node.attributes["grid"].as_string())


def node_target(node: ir.Node) -> str:
    """The name of the target that a FakeQuantize node stands for."""
    return node.attributes["target"].as_string()


def fake_quantize(x: ir.Value, grid: Grid, target: str) -> ir.Node:
    """A new FakeQuantize node."""
    attributes = [ir.AttrString("grid", grid.to_text()), ir.AttrString("target", target)]
    return ir.Node(DOMAIN, FAKE_QUANTIZE, [x], attributes)


def replace(graph: ir.Graph, node: ir.Node, new: ir.Value) -> None:
    """Every use of the node's output uses `new` instead, which is of the same shape; the node goes."""
    old = node.outputs[0]
    new.type, new.shape = old.type, old.shape
    if old.is_graph_output() and not new.is_graph_output() and not new.is_graph_input():
        new.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def merge_equal_(graph: ir.Graph) -> None:
    """Quantizers of one value on one grid become one, and a quantizer of what is on its grid already goes."""
    seen: dict[tuple[ir.Value, Grid], ir.Value] = {}
    for node in fake_quantizers(graph):
        x, grid = _input(node), node_grid(node)
        before = x.producer()
        if before is not None and is_fake_quantize(before) and _holds(node_grid(before), grid):
            replace(graph, node, x)
        elif (x, grid) in seen:
            replace(graph, node, seen[x, grid])
        else:
            seen[x, grid] = node.outputs[0]


def _holds(inner: Grid, outer: Grid) -> bool:
    """Whether every number of the inner grid is on the outer one."""
    same_steps = (inner.scale, inner.zero_point, inner.axis) == (outer.scale, outer.zero_point, outer.axis)
    return same_steps and outer.quant_min <= inner.quant_min and inner.quant_max <= outer.quant_max


def raise_above_movement_(graph: ir.Graph) -> None:
    """Quantize before a max pooling or a reshape, too, where only a quantizer reads what comes out of it.

    The layer in front then ends in integers, as its integer kernel needs.
    """
    pending = list(fake_quantizers(graph))
    while pending:
        node = pending.pop()
        moved, grid = _input(node).producer(), node_grid(node)
        if moved is None or moved.domain != "" or moved.op_type not in _MOVEMENT or grid.axis is not None:
            continue
        if not _read_once(_input(node)) or not _read_once(_input(moved)):
            continue
        above = fake_quantize(_input(moved), grid, node_target(node))
        graph.insert_before(moved, above)
        moved.replace_input_with(0, above.outputs[0])
        pending.append(above)


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def absorb_activations_(graph: ir.Graph) -> None:
    """A ReLU or clamp that only quantizers read becomes the range of their grids.

    `quantize(clamp(x, a, b)) == clamp(quantize(x), quantize(a), quantize(b))`, because quantizing is monotone.
    """
    for node in list(graph):
        bounds = _activation_bounds(node)
        if bounds is None or node.outputs[0].is_graph_output():
            continue
        users = [use.node for use in node.outputs[0].uses()]
        if not users or not all(is_fake_quantize(user) and node_grid(user).axis is None for user in users):
            continue
        for user in users:
            tightened = fake_quantize(_input(node), _tighten(node_grid(user), *bounds), node_target(user))
            graph.insert_before(user, tightened)
            replace(graph, user, tightened.outputs[0])
        graph.remove(node, safe=True)


def _activation_bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.domain != "":
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type == "Clip":
        bounds = [_scalar(value) for value in [*node.inputs[1:], None, None][:2]]
        if any(bound is None and value is not None for bound, value in zip(bounds, node.inputs[1:], strict=False)):
            return None
        low, high = bounds
        return -np.inf if low is None else low, np.inf if high is None else high
    return None


def _scalar(value: ir.Value | None) -> float | None:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else float(constant.numpy())


def _tighten(grid: Grid, low: float, high: float) -> Grid:
    bounds = np.array([low, high], np.float32) / np.float32(grid.scale[0]) + np.float32(grid.zero_point[0])
    lowest, highest = np.rint(np.clip(bounds, grid.quant_min, grid.quant_max)).astype(int).tolist()
    return dataclasses.replace(grid, quant_min=lowest, quant_max=highest)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def fold_transposes_(graph: ir.Graph) -> None:
    """Transposes of quantized weights disappear into the weights, so that integer kernels find them."""
    for node in fake_quantizers(graph):
        x, users = _input(node), [use.node for use in node.outputs[0].uses()]
        constant = ir.convenience.get_const_tensor(x)
        if constant is None or not users or any(user.op_type != "Transpose" for user in users):
            continue
        orders = {tuple(user.attributes["perm"].as_ints()) for user in users if "perm" in user.attributes}
        if len(orders) != 1 or x.name is None:
            continue
        (order,) = orders
        grid = node_grid(node)
        if grid.axis is not None:
            grid = dataclasses.replace(grid, axis=order.index(grid.axis))
        values = ir.tensor(np.ascontiguousarray(constant.numpy().transpose(order)))
        transposed = ir.val(f"{x.name}_transposed", const_value=values)
        graph.register_initializer(transposed)
        quantizer = fake_quantize(transposed, grid, node_target(node))
        graph.insert_before(node, quantizer)
        for user in users:
            replace(graph, user, quantizer.outputs[0])
        graph.remove(node, safe=True)


def kernel_axis(weight: ir.Node) -> int | None:
    """The dimension of a quantized weight along which the integer kernels of its layers take scales, if they do."""
    for use in weight.outputs[0].uses():
        node = use.node
        if node.op_type == "Conv":
            return 0
        if node.op_type == "Gemm":
            transposed = node.attributes.get_int("transB", 0)
            return 0 if transposed else 1
        if node.op_type == "MatMul":
            shape = weight.outputs[0].shape
            return None if shape is None else len(shape) - 1
    return None
