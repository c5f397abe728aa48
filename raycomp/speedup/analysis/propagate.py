"""The two passes that the surgery stands on: atoms (`relate`), and constants and needs (`propagate`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Graph, Value
from raycomp.speedup.rules.base import Registry


def relate(graph: Graph, rules: Registry, *, rigid: bool = False) -> Atoms:
    """The atoms of a graph: one pass over its calls, each rule relating the coordinates of inputs and outputs.

    Args:
        graph: the graph.
        rules: the operators' rules.
        rigid: leave alone whatever runs into an operator whose sizes the user's code may state as constants.
    """
    atoms = Atoms()
    for value in graph.values:
        if value.kind == "input":
            atoms.fix_value(value, "it is a dimension of the model's input")
        elif value.kind == "constant":
            atoms.fix_value(value, "it is a dimension of a tensor made inside forward()")
    for call in graph.calls:
        rule = rules.find(call)
        rule.relate(call, atoms)
        for value in call.outputs:
            for dim in range(value.ndim):
                if not atoms.known(value, dim):
                    atoms.fix_dim(value, dim, f"{call.label} sets its size")
        if rigid and rule.sized:
            for value in (*call.inputs, *call.outputs):
                atoms.fix_value(value, f"the code states sizes as constants at {call.label}")
    for value in graph.outputs:
        atoms.fix_value(value, "it reaches the model's output")
    for value in graph.state():
        if not graph.consumers[value]:
            atoms.fix_value(value, "forward() does not use it")
    return atoms


def run(graph: Graph, given: Mapping[Value, Tensor] | None = None) -> dict[Value, Tensor]:
    """Every value of the graph, for the example that it was traced with, on the CPU.

    Args:
        graph: the graph.
        given: what its inputs, parameters, buffers and constants are, if not what they were when it was traced.
    """
    tensors = dict(given or graph.tensors)
    with torch.no_grad():
        for call in graph.calls:
            if not call.outputs:
                continue
            for value, tensor in zip(call.outputs, call.run(tensors), strict=True):
                tensors[value] = tensor
    return {value: tensor.detach().cpu() for value, tensor in tensors.items()}


def propagate(graph: Graph, rules: Registry, tensors: Mapping[Value, Tensor], masked: Mapping[Value, Tensor]) -> Flow:
    """What is constant and what is needed.

    Args:
        graph: the graph.
        rules: the operators' rules.
        tensors: every value, from `run`.
        masked: for parameters and buffers, which elements a mask has zeroed.
    """
    flow = Flow(tensors)
    for value in graph.values:
        if value.kind == "input":
            flow.taint[value] = torch.ones(value.shape, dtype=torch.bool)
        elif value.kind != "result":
            flow.static.add(value)
            free = torch.ones(value.shape, dtype=torch.bool)
            flow.taint[value] = free & ~masked[value] if value in masked else free
    for call in graph.calls:
        _forward(call, rules, flow)
    _backward(graph, rules, flow)
    return flow


def _forward(call: Call, rules: Registry, flow: Flow) -> None:
    static = all(value in flow.static for value in call.inputs)
    if static:
        flow.static.update(call.outputs)
    given = {
        value: flow.taint[value].float() if static or value not in flow.static else torch.zeros(value.shape)
        for value in call.inputs
    }
    with torch.no_grad():
        results = rules.find(call).influence(call, given, flow)
    for value, result in zip(call.outputs, results, strict=True):
        flow.taint[value] = result > 0


def _backward(graph: Graph, rules: Registry, flow: Flow) -> None:
    for value in graph.values:
        full = torch.ones if value in flow.static else torch.zeros
        flow.needed[value] = full(value.shape, dtype=torch.bool)
    for value in graph.outputs:
        flow.needed[value] = torch.ones(value.shape, dtype=torch.bool)
    for call in reversed(graph.calls):
        wanted = [value for value in call.inputs if value not in flow.static]
        if not wanted or not any(bool(flow.needed[value].any()) for value in call.outputs):
            continue
        for value, needed in _needs(call, rules, flow).items():
            flow.needed[value] = flow.needed[value] | needed


def _needs(call: Call, rules: Registry, flow: Flow) -> dict[Value, Tensor]:
    """The input elements that the needed output elements depend on: the transpose of `Rule.influence`."""
    given = {value: torch.zeros(value.shape, requires_grad=True) for value in dict.fromkeys(call.inputs)}
    wanted = [value for value in given if value not in flow.static]
    with torch.enable_grad():
        results = rules.find(call).influence(call, given, flow)
        total = sum(
            ((result * flow.needed[value]).sum() for value, result in zip(call.outputs, results, strict=True)),
            torch.zeros(()),
        )
    if not total.requires_grad:
        return {}
    gradients = torch.autograd.grad(total, [given[value] for value in wanted], allow_unused=True)
    return {value: gradient > 0 for value, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
