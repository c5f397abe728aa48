"""What goes with each channel: coordinates of parameters, multiply-accumulates; from the atoms of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from raycomp.core.coupling import Cost, Coupling, Extent, Layers, Part, Term
from raycomp.speedup.analysis.dependency import TracedModel
from raycomp.speedup.analysis.study import Group, Study, canonical_names
from raycomp.speedup.graph.atoms import Ids
from raycomp.speedup.graph.graph import Value
from raycomp.speedup.graph.macs import count_macs
from raycomp.speedup.rules import RULES
from raycomp.speedup.rules.base import Registry, tolerating


def coupling(traced: TracedModel, module_names: Sequence[str]) -> Coupling:
    """What goes with the output channels of layers.

    Args:
        traced: the model.
        module_names: layers with a weight of two dimensions or more. Channels of other layers count as ones that stay.

    Raises:
        SpeedupError: a module is not there or has no such weight.
    """
    return tolerating(RULES, lambda rules: _coupling(traced, module_names, rules))


def _coupling(traced: TracedModel, module_names: Sequence[str], rules: Registry) -> Coupling:
    study = Study(traced.model, traced.graph, canonical_names(traced.model, module_names), rules)
    groups = study.groups()
    reasons = study.obstacles(groups, study.followers(groups))
    channels = _Channels(study, [group for group, reason in zip(groups, reasons, strict=True) if reason is None])
    layers = [Layers(group.modules, tuple(channels.of(study.outputs(group.modules[0])).tolist())) for group in groups]
    return Coupling(
        channels.cells,
        tuple(channels.parts()),
        tuple(layers),
        Cost(tuple(_macs(traced, study, channels))),
        Cost(tuple(_parameters(study, channels))),
    )


class _Channels:
    """Which channel each atom is, and in which cell."""

    def __init__(self, study: Study, groups: Sequence[Group]) -> None:
        self._study = study
        makers: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            for root in np.unique(study.outputs(group.modules[0])):
                makers.setdefault(int(root), []).append(index)
        kinds = {kind: cell for cell, kind in enumerate(dict.fromkeys(tuple(each) for each in makers.values()))}
        self.cells = tuple(kinds[tuple(each)] for each in makers.values())
        self._channel_of: NDArray[np.int64] = np.full(len(study.atoms), -1, dtype=np.int64)
        self._channel_of[list(makers)] = range(len(makers))

    def of(self, ids: Ids) -> NDArray[np.int64]:
        """The channel of each coordinate, -1 for none."""
        found: NDArray[np.int64] = self._channel_of[self._study.atoms.roots(ids)]
        return found

    def extents(self, dims: Sequence[Ids]) -> tuple[Extent, ...]:
        """The sizes of dimensions; those of which nothing can go are left out."""
        cells = np.array([*self.cells, -1])
        found = []
        for ids in dims:
            numbers, counts = np.unique(cells[self.of(ids)], return_counts=True)
            shares = {int(cell): float(count) / len(ids) for cell, count in zip(numbers, counts, strict=True)}
            fixed = shares.pop(-1, 0.0)
            if shares:
                found.append(Extent(fixed, tuple(shares.items())))
        return tuple(found)

    def parts(self) -> Iterator[Part]:
        """The dimensions of parameters in which channels lie."""
        for value in self._study.graph.state():
            for (dim, groups), ids in dims_of(self._study, value).items():
                found = self.of(ids)
                if value.kind == "parameter" and (found >= 0).any():
                    yield Part(value.tensor, dim, tuple(found.tolist()), value.ndim, groups)


def dims_of(study: Study, value: Value) -> dict[tuple[int, int], Ids]:
    """The atoms of a parameter's dimensions, by dimension and groups; a grouped weight's columns are its groups'."""
    found = {(dim, 1): study.atoms.ids(value, dim) for dim in range(value.ndim) if value.shape[dim] > 1}
    for each in study.channels:
        if each.weight is value:
            found.pop((1, 1), None)
            found[1, each.groups] = each.columns
    return found


def _macs(traced: TracedModel, study: Study, channels: _Channels) -> list[Term]:
    graph = traced.graph
    batch = next((value.shape[0] for value in graph.values if value.kind == "input" and value.shape), 1)
    works = [study.rules.find(call).work(call, study.atoms) for call in graph.calls]
    terms = [Term(work.macs / batch, channels.extents(work.dims)) for work in works if work is not None]
    # What no rule counts stays as it is.
    return [*terms, Term(count_macs(traced.model, traced.example) - sum(term.amount for term in terms))]


def _parameters(study: Study, channels: _Channels) -> list[Term]:
    own = [value for value in study.graph.state() if value.kind == "parameter"]
    return [Term(prod(value.shape), channels.extents(list(dims_of(study, value).values()))) for value in own]
