"""A graph and the layers that shall be pruned: what the questions about channels are answered from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raycomp.core.layout import Layout, layout_of
from raycomp.core.target import TargetId
from raycomp.errors import SpeedupError
from raycomp.speedup.analysis.decide import decide
from raycomp.speedup.analysis.propagate import propagate, relate, run
from raycomp.speedup.graph.atoms import Atoms, Ids
from raycomp.speedup.graph.graph import Call, Graph, Value
from raycomp.speedup.rules.base import Registry


@dataclass(frozen=True)
class Group:
    """Modules whose output channels go one by one together: they need one mask.

    Args:
        modules: their names, in the order in which they were asked for.
        blocks: in each of this many equal blocks the same number must go (grouped convolutions).
        unit: channels go only in runs of this many (the groups of a GroupNorm).
        obstacle: why no channel can ever be removed exactly; None where it can.
    """

    modules: tuple[str, ...]
    blocks: int = 1
    unit: int = 1
    obstacle: str | None = None


class Study:
    """The layers of a graph, with the atoms of their output channels.

    Args:
        model: the model.
        graph: its graph.
        names: of layers with a weight of two dimensions or more.
        rules: the operators' rules.

    Raises:
        SpeedupError: a layer has no such weight.
    """

    def __init__(self, model: nn.Module, graph: Graph, names: Sequence[str], rules: Registry) -> None:
        self.graph, self.rules = graph, rules
        self.names = list(dict.fromkeys(names))
        self.atoms: Atoms = relate(graph, rules)
        self.by_name = {value.tensor: value for value in graph.state()}
        self.weights: dict[str, Value] = {}
        self.layouts: dict[str, Layout] = {}
        first = {id(tensor): name for name, tensor in model.named_parameters()}
        for name in self.names:
            own = getattr(model.get_submodule(name), "weight", None)
            weight = self.by_name.get(first.get(id(own), ""))  # a tied one is known by its first name
            if weight is None or weight.ndim < 2:
                raise SpeedupError("it has no weight with channels to prune", where=name)
            self.weights[name] = weight
            self.layouts[name] = layout_of(model, TargetId(name, "weight"))
        self.channels = [each for call in graph.calls for each in rules.find(call).channels(call, self.atoms)]

    def outputs(self, name: str) -> Ids:
        """The atoms of a layer's output channels."""
        weight, layout = self.weights[name], self.layouts[name]
        if layout.groups == 1:
            return self.atoms.roots(self.atoms.ids(weight, layout.channel_dim or 0))
        for each in self.channels:
            if each.weight is weight:
                return self.atoms.roots(each.columns)
        # Depthwise and transposed: the outputs go with their inputs.
        return self.atoms.roots(np.repeat(self.atoms.ids(weight, 0)[: layout.groups], weight.shape[1]))

    def follows(self, value: Value, outputs: Ids) -> bool:
        """Whether a parameter that isn't a layer's weight has the same channels, in dimension 0."""
        return np.array_equal(self.atoms.roots(self.atoms.ids(value, 0)), outputs)

    def groups(self) -> list[Group]:
        """Modules with equal atoms; fixed ones, which share nothing that could go, stay apart."""
        found: dict[object, list[str]] = {}
        for name in self.weights:
            outputs = self.outputs(name)
            found.setdefault(name if self._is_fixed(outputs) else outputs.tobytes(), []).append(name)
        return [Group(tuple(names), self._blocks(names[0]), self._unit(names[0])) for names in found.values()]

    def _is_fixed(self, outputs: Ids) -> bool:
        return all(self.atoms.reason(int(root)) is not None for root in np.unique(outputs))

    def _blocks(self, name: str) -> int:
        outputs = self.outputs(name)
        sides = [(each.groups, self.atoms.roots(side)) for each in self.channels for side in (each.rows, each.columns)]
        return math.lcm(*(groups for groups, side in sides if np.array_equal(side, outputs)))

    def _unit(self, name: str) -> int:
        """The length of the runs of equal atoms, where all runs are equally long and each atom is in one of them.

        1 where nothing can go: a whole layer is no run that could.
        """
        outputs = self.outputs(name)
        starts = np.flatnonzero(np.diff(outputs, prepend=-1))
        lengths = np.diff(starts, append=len(outputs))
        distinct = len(np.unique(outputs))
        even = 1 < distinct == len(starts) and len(set(lengths.tolist())) == 1
        return int(lengths[0]) if even else 1

    def followers(
        self, groups: Sequence[Group], group_ids: Mapping[str, str | None] | None = None
    ) -> dict[str, list[str]]:
        taken: set[str] = set()
        found: dict[str, list[str]] = {}
        for group in groups:
            for name in group.modules:
                same = set(group.modules)
                if group_ids is not None:
                    number = group_ids.get(name)
                    same = {each for each in same if number is not None and group_ids.get(each) == number} | {name}
                fresh = [each for each in dict.fromkeys(self._following(name, same)) if each not in taken]
                taken.update(fresh)
                found[name] = fresh
        return {name: found[name] for name in self.names}

    def _following(self, name: str, same_mask: set[str]) -> Iterator[str]:
        outputs = self.outputs(name)
        reached: list[Value] = []
        for call in self.graph.consumers[self.weights[name]]:
            yield from self._own(call, outputs)
            reached += call.outputs[:1]
        seen: set[Call] = set()
        while reached:
            value = reached.pop(0)
            for call in self.graph.consumers[value]:
                if call in seen or not self._carries(call, outputs, same_mask):
                    continue
                seen.add(call)
                yield from (n for n in self._own(call, outputs) if n.rpartition(".")[0] not in self.weights)
                reached += call.outputs[:1]

    def _own(self, call: Call, outputs: Ids) -> Iterator[str]:
        """The call's parameters that go with the channels, the weights of the layers in question aside."""
        for value in call.inputs:
            is_layer = value.kind != "parameter" or value in self.weights.values()
            if not is_layer and self.follows(value, outputs):
                yield value.tensor

    def _carries(self, call: Call, outputs: Ids, same_mask: set[str]) -> bool:
        """Whether the call passes the channels on, and nothing else is in them than what has the same mask."""
        if not call.outputs or call.owner in self.weights:
            return False
        output = call.output
        dims = (self.atoms.roots(self.atoms.ids(output, dim)) for dim in range(output.ndim))
        if not any(np.array_equal(ids, outputs) for ids in dims):
            return False
        dynamic = [value for value in call.inputs if value.kind not in ("parameter", "buffer")]
        if len(dynamic) == 1:
            return True
        makers = {
            c.owner for c in self.graph.calls if outputs[0] in self.atoms.roots(self.rules.find(c).makes(c, self.atoms))
        }
        return makers <= same_mask

    def obstacles(self, groups: Sequence[Group], following: Mapping[str, Sequence[str]]) -> list[str | None]:
        """Tries the removal of one coordinate (of each block) in every group, on the graph alone."""
        masked: dict[Value, Tensor] = {}
        tried = []
        for group in groups:
            outputs = self.outputs(group.modules[0])
            block = len(outputs) // group.blocks
            chosen = np.zeros(len(outputs), dtype=bool)
            for start in range(0, len(outputs), max(block, 1)):
                chosen[start : start + group.unit] = True
            tried.append(np.unique(outputs[chosen]))
            if self._is_fixed(outputs):
                # Where they are one atom, masking it would leave nothing of the layers before.
                continue
            gone = torch.from_numpy(np.isin(outputs, outputs[chosen]))
            for name in group.modules:
                for value in (self.weights[name], *(self.by_name[tensor] for tensor in following[name])):
                    layout = self.layouts[name] if value is self.weights[name] else Layout(value.shape, 0)
                    elements = layout.channels(torch.arange(math.prod(value.shape)).reshape(value.shape))
                    masked.setdefault(value, torch.zeros(value.shape, dtype=torch.bool)).view(-1)[elements[gone]] = True
        tensors = dict(self.graph.tensors)
        for value, mask in masked.items():
            tensors[value] = tensors[value] * (~mask).to(tensors[value])
        flow = propagate(self.graph, self.rules, run(self.graph, tensors), masked)
        decision = decide(self.graph, self.rules, self.atoms, flow, masked, exact=True)
        return [
            next((decision.reasons[int(root)] for root in roots if not decision.removed[root]), None) for roots in tried
        ]


def canonical_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The first name of each module (a shared one has several)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in model.named_modules()}
    for name in names:
        if name not in modules:
            raise SpeedupError(f"the model has no module {name!r}")
    return [first[id(modules[name])] for name in names]
