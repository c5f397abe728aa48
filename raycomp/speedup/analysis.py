"""All that is found out about a masked model before it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raycomp.speedup.atoms import Atoms, Ids
from raycomp.speedup.decide import Decision, decide, masked_slices
from raycomp.speedup.flow import Flow
from raycomp.speedup.graph import Call, Graph, Value
from raycomp.speedup.masks import Masks, buffer_name, canonical_target, value_masks
from raycomp.speedup.propagate import propagate, relate
from raycomp.speedup.rules.base import Bools, Registry


@dataclass(frozen=True)
class Unpruned:
    """Coordinates that a mask names and speedup left in the model.

    Args:
        module: the module's name.
        dim: the dimension of the masked tensor.
        count: how many coordinates.
        reason: why.
    """

    module: str
    dim: int
    count: int
    reason: str


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
    exact: bool = True,
    rigid: bool = False,
) -> Analysis:
    """Finds what can go.

    Args:
        graph: the graph of the masked model.
        rules: the operators' rules.
        tensors: its values, from `run`.
        masked: which elements of parameters and buffers are masked, from `masked_elements`.
        exact: whether nothing may go that changes the outputs.
        rigid: leave alone what runs into operators whose sizes the user's code may state as constants.
    """
    atoms = relate(graph, rules, rigid=rigid)
    flow = propagate(graph, rules, tensors, masked)
    decision = decide(graph, rules, atoms, flow, masked, exact=exact)
    return Analysis(graph, rules, atoms, masked, flow, decision)


def masked_elements(graph: Graph, model: nn.Module, masks: Masks) -> dict[Value, Tensor]:
    """For every masked parameter, and every mask on an input or output, which elements are masked.

    Args:
        graph: the graph of the masked model.
        model: the masked model.
        masks: its masks.
    """
    found: dict[Value, Tensor] = {}
    by_name = _by_name(graph, model)
    for name, targets in masks.items():
        for target, mask in targets.items():
            value = by_name.get(_full_name(name, target))
            if value is not None and value.kind == "parameter":
                found[value] = found.get(value, torch.zeros(value.shape, dtype=torch.bool)) | (mask == 0).cpu()
    for (name, target), mask in value_masks(model).items():
        value = by_name.get(_full_name(name, target))
        if value is not None:
            found[value] = (mask == 0).cpu()
    return found


def _by_name(graph: Graph, model: nn.Module) -> dict[str, Value]:
    """The graph's parameters and buffers by all their names."""
    canonical = {value.tensor: value for value in graph.state()}
    first: dict[int, str] = {}
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in names:
        first.setdefault(id(tensor), name)
    return {name: canonical[first[id(tensor)]] for name, tensor in names if first[id(tensor)] in canonical}


def _full_name(module: str, target: str) -> str:
    target = canonical_target(target)
    last = buffer_name(target) if target.startswith(("_input_", "_output_")) else target
    return f"{module}.{last}" if module else last


def unpruned(analysis: Analysis, model: nn.Module, masks: Masks) -> tuple[Unpruned, ...]:
    """What the masks name and the decision leaves, by module, dimension and reason."""
    by_name = _by_name(analysis.graph, model)
    counts: dict[tuple[str, int, str], int] = {}
    named: set[int] = set()
    # Layers before the norms that follow them: what a layer is named for isn't named again for its norm.
    for name, targets in sorted(masks.items(), key=lambda item: all(mask.ndim < 2 for mask in item[1].values())):
        seen: set[int] = set()
        for target in sorted(targets, key=lambda each: each != "weight"):
            if target == "bias" and "weight" in targets:
                continue
            mask = targets[target] == 0
            before = seen | named if mask.ndim < 2 else seen.copy()
            value = by_name.get(_full_name(name, target))
            for dim, coordinates in _masked_coordinates(mask):
                if value is None:
                    _count(counts, name, dim, "forward() does not use it", int(coordinates.sum()))
                    continue
                for root in _roots(analysis, value, dim, coordinates.cpu().numpy()):
                    if not analysis.decision.removed[root] and root not in before:
                        seen.add(int(root))
                        _count(counts, name, dim, _reason(analysis, int(root), name))
        named |= seen
    return tuple(Unpruned(module, dim, count, reason) for (module, dim, reason), count in counts.items())


def _roots(analysis: Analysis, value: Value, dim: int, coordinates: Bools) -> Ids:
    """The atoms of a masked tensor's coordinates; a grouped weight's column stands for a channel of each group."""
    for each in analysis.decision.channels:
        if each.weight is value and dim == 1:
            return analysis.atoms.roots(each.columns.reshape(each.groups, -1)[:, coordinates].ravel())
    return analysis.atoms.roots(analysis.atoms.ids(value, dim)[coordinates])


def _count(counts: dict[tuple[str, int, str], int], module: str, dim: int, reason: str, count: int = 1) -> None:
    counts[module, dim, reason] = counts.get((module, dim, reason), 0) + count


def _masked_coordinates(mask: Tensor) -> list[tuple[int, Tensor]]:
    """For each of a mask's dimensions, the coordinates that are masked throughout, beside those of earlier ones."""
    found = []
    rest = mask
    for dim in range(mask.ndim):
        if rest.numel() == 0:
            break
        whole = rest.movedim(dim, 0).reshape(rest.shape[dim], -1).all(dim=1)
        if whole.any():
            found.append((dim, whole))
        rest = rest.index_select(dim, torch.nonzero(~whole).reshape(-1))
    return found


def _reason(analysis: Analysis, root: int, module: str) -> str:
    """Why an atom stays; where another layer makes it, too, and doesn't mask it, that layer is named."""
    never = analysis.atoms.reason(root)
    if never is not None:
        return never
    others = [label for label in _unmasked_makers(analysis, root) if label != module]
    if others:
        names = ", ".join(f"'{label}'" for label in sorted(set(others)))
        return f"it is shared with {names}, not masked there"
    return analysis.decision.reasons.get(root, "no analysis found it removable")


def _unmasked_makers(analysis: Analysis, root: int) -> list[str]:
    found = []
    for call in analysis.graph.calls:
        made = analysis.rules.find(call).makes(call, analysis.atoms)
        if root in analysis.atoms.roots(made) and not _is_masked(analysis, call, root):
            found.append(call.owner)
    return found


def _is_masked(analysis: Analysis, call: Call, root: int) -> bool:
    for value in call.inputs:
        if value in analysis.masked and value.ndim >= 2:
            for dim in range(value.ndim):
                ids: Ids = masked_slices(analysis.atoms.ids(value, dim), analysis.masked[value], dim)
                if np.isin(root, analysis.atoms.roots(ids)):
                    return True
    return False
