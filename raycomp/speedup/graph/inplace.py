"""In-place operators of an exported graph, read as their functional counterparts where that is the same.

`run_decompositions` does it for every graph, but takes longer than the export itself.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.program import cause_of, quiet

_FRESH = {
    f"aten.{name}"
    for name in """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm batch_norm
    instance_norm group_norm layer_norm relu sigmoid silu gelu hardswish hardtanh leaky_relu elu add sub mul div cat
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d mean sum clone
    """.split()  # noqa: SIM905
}
"""Operators whose result shares no memory with what they take."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program, rewritten by torch only if its in-place operators can't be read as functional ones.

    Raises:
        SpeedupError: torch can't rewrite it.
    """
    if all(_reads_as_functional(node) for node in program.graph.nodes if _mutates(node)):
        return program
    try:
        with quiet(), torch.no_grad():
            return program.run_decompositions({})
    except Exception as error:
        raise SpeedupError(f"the in-place operators of forward() can't be rewritten: {cause_of(error)}") from error


def functional_target(node: fx.Node) -> Any:
    """What a node calls; for an in-place operator its functional counterpart."""
    return _counterpart(node.target) if _mutates(node) else node.target


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _counterpart(target: Any) -> Any:
    """`aten.relu` for `aten.relu_`, None where there is none of the same arguments."""
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    names = [argument.name for argument in target._schema.arguments]
    return found if [argument.name for argument in found._schema.arguments] == names else None


def _reads_as_functional(node: fx.Node) -> bool:
    """Whether the operator changes its first argument, which nothing else shares memory with."""
    changed = node.args[0] if node.args else None
    if _counterpart(node.target) is None or not isinstance(changed, fx.Node) or not _is_fresh(changed):
        return False
    return all(user is node or _is_fresh(user) for user in changed.users)


def _is_fresh(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    target = functional_target(node)
    return isinstance(target, torch._ops.OpOverload) and str(target.overloadpacket) in _FRESH
