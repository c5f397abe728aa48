"""From a decision to cuts of the live model, and the constants that biases absorb."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raycomp.speedup.analysis.decide import Decision, kept_groups
from raycomp.speedup.graph.atoms import Atoms, Ids
from raycomp.speedup.graph.graph import Call, Execution, Graph, Value, executions
from raycomp.speedup.rules.base import Bools, Channels, Kept, Registry
from raycomp.speedup.surgery.plan import ActivationCut, Attribute, Block, BlockCut, Cut, NewBias, Surgery


def build(graph: Graph, rules: Registry, atoms: Atoms, decision: Decision, model: nn.Module) -> Surgery:
    """The cuts that a decision means.

    Args:
        graph, rules, atoms, decision: the analysis.
        model: the model that was analysed.
    """
    kept = Kept(atoms, decision.removed)
    grouped = {each.weight for each in decision.channels}
    cuts = [cut for value in graph.state() for cut in _cuts(value, kept, skip=value in grouped)]
    blocks = [cut for each in _first_uses(decision) if (cut := _block_cut(each, decision, atoms)) is not None]
    biases = []
    for addition in additions(decision):
        if addition.bias is None:
            biases.append(NewBias(addition.module, len(addition.delta)))
            cuts += _cut(f"{addition.module}.bias", 0, kept.of(addition.outputs))
    modules = dict(model.named_modules())
    attributes = dict.fromkeys(
        attribute
        for call in graph.calls
        for attribute in _attributes(call, rules, kept, atoms, decision)
        if getattr(modules.get(attribute.module), attribute.name, None) == attribute.old
    )
    activations = dict.fromkeys(cut for each in executions(graph, model) for cut in _activations(each, graph, kept))
    return Surgery(tuple(cuts), tuple(blocks), tuple(attributes), tuple(biases), activations=tuple(activations))


def _cut(tensor: str, dim: int, stays: Bools) -> list[Cut]:
    if stays.all():
        return []
    return [Cut(tensor, dim, len(stays), tuple(np.flatnonzero(stays).tolist()))]


def _cuts(value: Value, kept: Kept, skip: bool) -> Iterator[Cut]:
    for dim in range(2 if skip else 0, value.ndim):
        yield from _cut(value.tensor, dim, kept.mask(value, dim))


def _first_uses(decision: Decision) -> list[Channels]:
    return list({each.weight: each for each in reversed(decision.channels)}.values())[::-1]


def _block_cut(each: Channels, decision: Decision, atoms: Atoms) -> BlockCut | None:
    rows, columns = len(each.rows), len(each.columns) // each.groups
    stays = kept_groups(decision, atoms, each)
    if sum(len(r) for r, _ in stays) == rows and all(len(c) == columns for _, c in stays):
        return None
    blocks = tuple(Block(tuple(r.tolist()), tuple(c.tolist())) for r, c in stays)
    return BlockCut(each.weight.tensor, (rows, columns), blocks)


def _attributes(call: Call, rules: Registry, kept: Kept, atoms: Atoms, decision: Decision) -> Iterator[Attribute]:
    for new in rules.find(call).attributes(call, kept.size):
        if new.old != new.new:
            yield Attribute(new.module, new.name, new.old, new.new)
    for each in rules.find(call).channels(call, atoms):
        groups = len(kept_groups(decision, atoms, each))
        if groups != each.groups:
            yield Attribute(call.owner, "groups", each.groups, groups)


def _activations(execution: Execution, graph: Graph, kept: Kept) -> Iterator[ActivationCut]:
    """The cuts of a layer's input and output, for what is measured there (the scales of quantizers)."""
    for target, values in (("_input_0", execution.sources()), ("_output_0", execution.results(graph))):
        for value in values[:1]:
            for dim in range(value.ndim):
                for cut in _cut("", dim, kept.mask(value, dim)):
                    yield ActivationCut(execution.module, target, dim, cut.size, cut.keep)


@dataclass(frozen=True)
class Addition:
    """What removed constants add to the bias of one contraction.

    Args:
        weight: its weight.
        bias: its bias, where it has one.
        module: the module that holds it.
        delta: what is added, in the size before the cut.
        outputs: the atoms of the bias's coordinates.
    """

    weight: Value
    bias: Value | None
    module: str
    delta: NDArray[np.float64]
    outputs: Ids


def additions(decision: Decision) -> list[Addition]:
    """What removed constants add to biases, once for each weight."""
    found: dict[Value, Addition] = {}
    for roots, absorption in decision.absorptions:
        delta = absorption.matrix @ np.where(decision.removed[roots], absorption.constants, 0.0)
        if delta.any():
            weight, bias, module = absorption.weight, absorption.bias, absorption.module or ""
            found.setdefault(weight, Addition(weight, bias, module, delta, absorption.outputs))
    return list(found.values())


def absorb_constants(model: nn.Module, decision: Decision) -> None:
    """Adds the constants that removed inputs carried to the biases of a model that isn't cut yet."""
    with torch.no_grad():
        for addition in additions(decision):
            like = _tensor(model, addition.weight.tensor)
            delta = torch.from_numpy(addition.delta).to(like)
            if addition.bias is not None:
                _tensor(model, addition.bias.tensor).add_(delta)
            else:
                bias = nn.Parameter(delta, requires_grad=like.requires_grad)
                model.get_submodule(addition.module).bias = bias


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), last)
    assert isinstance(tensor, Tensor)
    return tensor
