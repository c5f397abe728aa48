"""All that is found out about a masked model before it is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycomp.core.masks import Masks
from raycomp.speedup.analysis.decide import Decision, decide
from raycomp.speedup.analysis.propagate import propagate, relate
from raycomp.speedup.analysis.training_only import Pin
from raycomp.speedup.graph.atoms import Atoms
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Graph, Value
from raycomp.speedup.graph.value_masks import buffer_name, full_name, value_masks
from raycomp.speedup.rules.base import Registry


@dataclass(frozen=True)
class Analysis:
    """The graph of a masked model, what goes together in it, and what goes."""

    graph: Graph
    rules: Registry
    atoms: Atoms
    masked: Mapping[Value, Tensor]
    flow: Flow
    decision: Decision


def analyse(
    graph: Graph,
    rules: Registry,
    tensors: Mapping[Value, Tensor],
    masked: Mapping[Value, Tensor],
    *,
    pins: Sequence[Pin] = (),
    exact: bool = True,
    rigid: bool = False,
) -> Analysis:
    """Finds what can go.

    Args:
        graph: the graph of the masked model.
        rules: the operators' rules.
        tensors: its values, from `run`.
        masked: which elements of parameters and buffers are masked, from `masked_elements`.
        pins: what stays for the sake of training, from `training_pins`.
        exact: whether nothing may go that changes the outputs.
        rigid: leave alone what runs into operators whose sizes the user's code may state as constants.
    """
    atoms = relate(graph, rules, rigid=rigid)
    for pin in pins:
        atoms.fix(atoms.ids(pin.value, pin.dim)[pin.stays], pin.reason)
    flow = propagate(graph, rules, tensors, masked)
    decision = decide(graph, rules, atoms, flow, masked, exact=exact)
    return Analysis(graph, rules, atoms, masked, flow, decision)


def masked_elements(graph: Graph, model: nn.Module, masks: Masks) -> dict[Value, Tensor]:
    """For every masked parameter, and every mask on an input or output, which elements are zeroed.

    Args:
        graph: the graph of the masked model.
        model: the masked model.
        masks: its masks.
    """
    found: dict[Value, Tensor] = {}
    by_name = state_by_name(graph, model)
    for (name, target), mask in masks.by_target():
        value = by_name.get(full_name(name, target))
        if value is not None and value.kind == "parameter" and masks.method(name, target) == "mul":
            found[value] = found.get(value, torch.zeros(value.shape, dtype=torch.bool)) | (mask == 0).cpu()
    for (name, target), present in value_masks(model).items():
        value = by_name.get(full_name(name, buffer_name(target)))
        if value is not None and present.method == "mul":
            found[value] = (present.mask == 0).cpu()
    return found


def state_by_name(graph: Graph, model: nn.Module) -> dict[str, Value]:
    """The graph's parameters and buffers by all their names in the model."""
    canonical = {value.tensor: value for value in graph.state()}
    first: dict[int, str] = {}
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in names:
        first.setdefault(id(tensor), name)
    return {name: canonical[first[id(tensor)]] for name, tensor in names if first[id(tensor)] in canonical}
