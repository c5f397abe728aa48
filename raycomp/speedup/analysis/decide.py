"""Which atoms go: those that masks made removable, shrunk until every call still fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from raycomp.speedup.analysis.propagate import propagate
from raycomp.speedup.graph.atoms import Atoms, Ids
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Graph, Value
from raycomp.speedup.rules.base import Absorption, Bools, Channels, Registry, Sink


@dataclass
class Decision:
    """What goes.

    Args:
        removed: for each atom that represents its class, whether it goes.
        reasons: why an atom stays.
        absorptions: the contractions that absorb constants.
        channels: the grouped convolutions.
    """

    removed: Bools
    reasons: dict[int, str] = field(default_factory=dict)
    absorptions: list[tuple[Ids, Absorption]] = field(default_factory=list)
    channels: list[Channels] = field(default_factory=list)

    def keep(self, roots: Ids, reason: str) -> None:
        """Says that atoms stay; the first reason stands."""
        for root in np.unique(roots):
            self.reasons.setdefault(int(root), reason)
        self.removed[roots] = False

    def keep_all(self, reason: str) -> None:
        """Says that nothing goes, and why what would have gone doesn't."""
        self.keep(np.flatnonzero(self.removed), reason)


def decide(
    graph: Graph, rules: Registry, atoms: Atoms, flow: Flow, masked: Mapping[Value, Tensor], *, exact: bool
) -> Decision:
    """The greatest set of atoms that can go.

    Args:
        graph, rules, atoms, flow: the analysis.
        masked: for parameters and buffers, which elements a mask has zeroed.
        exact: whether nothing may go that changes the outputs.
    """
    sinks = [sink for call in graph.calls for sink in rules.find(call).sinks(call, atoms, flow)]
    channels = [each for call in graph.calls for each in rules.find(call).channels(call, atoms)]
    decision = Decision(np.ones(len(atoms), dtype=bool), channels=channels)
    for root, reason in atoms.fixed_roots().items():
        decision.keep(np.array([root]), reason)
    _apply_sinks(decision, atoms, sinks, exact)
    _require_equal_constants(decision, atoms, sinks)
    _require_mask(decision, graph, rules, atoms, flow, masked)
    _shrink(decision, atoms)
    decision.absorptions = [(atoms.roots(sink.ids), sink.absorption) for sink in sinks if sink.absorption is not None]
    return decision


def _apply_sinks(decision: Decision, atoms: Atoms, sinks: Sequence[Sink], exact: bool) -> None:
    for sink in sinks:
        roots = atoms.roots(sink.ids)
        for mask, reason in (*sink.blocked, *(sink.approximate if exact else ())):
            decision.keep(roots[mask], reason)


def _require_equal_constants(decision: Decision, atoms: Atoms, sinks: Sequence[Sink]) -> None:
    """A weight that is used several times has one bias: its inputs' constants must be the same every time."""
    uses: dict[Value, list[tuple[Ids, Absorption]]] = {}
    biases: dict[Value, set[Value]] = {}
    for sink in sinks:
        if sink.absorption is not None:
            uses.setdefault(sink.absorption.weight, []).append((atoms.roots(sink.ids), sink.absorption))
            if sink.absorption.bias is not None:
                biases.setdefault(sink.absorption.bias, set()).add(sink.absorption.weight)
    for absorptions in uses.values():
        first = absorptions[0][1].constants
        for roots, absorption in absorptions:
            differs = ~np.isclose(absorption.constants, first, rtol=1e-5, atol=0)
            decision.keep(roots[differs], "the module is called several times, with different constants")
            if absorption.bias is not None and len(biases[absorption.bias]) > 1:
                decision.keep(roots[absorption.constants != 0], "its bias is shared and can't absorb a constant")


def _require_mask(
    decision: Decision,
    graph: Graph,
    rules: Registry,
    atoms: Atoms,
    flow: Flow,
    masked: Mapping[Value, Tensor],
) -> None:
    """Leaves alone what is dead in the model as the user wrote it: only masks are a reason to cut."""
    licensed = np.zeros(len(atoms), dtype=bool)
    for value, mask in masked.items():
        for dim in range(value.ndim):
            licensed[atoms.roots(masked_slices(atoms.ids(value, dim), mask, dim))] = True
    candidates = decision.removed & _present(atoms)
    if (candidates & ~licensed).any():
        as_written = propagate(graph, rules, flow.tensors, {})
        unmasked = Decision(decision.removed.copy())
        _apply_sinks(unmasked, atoms, [s for c in graph.calls for s in rules.find(c).sinks(c, atoms, as_written)], True)
        licensed |= ~unmasked.removed
    decision.keep(np.flatnonzero(candidates & ~licensed), "no mask asks for it")
    decision.removed &= candidates


def masked_slices(ids: Ids, mask: Tensor, dim: int) -> Ids:
    """The atoms of the coordinates of a dimension that are masked throughout."""
    whole = mask.movedim(dim, 0).reshape(mask.shape[dim], -1).all(dim=1)
    found: Ids = ids[whole.cpu().numpy()]
    return found


def _present(atoms: Atoms) -> Bools:
    present = np.zeros(len(atoms), dtype=bool)
    for ids in atoms.dims():
        present[atoms.roots(ids)] = True
    return present


def _shrink(decision: Decision, atoms: Atoms) -> None:
    """Puts atoms back until every dimension has a coordinate left and all groups are of one size.

    Each round puts back at least one atom, so that it ends.
    """
    dims = _distinct_dims(atoms)
    groups = [
        (atoms.roots(c.rows).reshape(c.groups, -1), atoms.roots(c.columns).reshape(c.groups, -1), c)
        for c in decision.channels
    ]
    while True:
        before = int(decision.removed.sum())
        for roots in dims:
            if decision.removed[roots].all():
                decision.keep(roots[:1], "a dimension keeps at least one coordinate")
        for rows, columns, each in groups:
            _balance(decision, rows, columns, f"the groups of {each.label} keep equal sizes")
        if int(decision.removed.sum()) == before:
            return


def _distinct_dims(atoms: Atoms) -> list[Ids]:
    seen: dict[bytes, Ids] = {}
    for ids in atoms.dims():
        roots = np.unique(atoms.roots(ids))
        seen.setdefault(roots.tobytes(), roots)
    return list(seen.values())


def _balance(decision: Decision, rows: Ids, columns: Ids, reason: str) -> None:
    """Whole groups go where all their rows and columns can; the others lose as many as the one that can lose least."""
    whole = decision.removed[rows].all(axis=1) & decision.removed[columns].all(axis=1)
    for side in (rows, columns):
        counts = np.minimum(decision.removed[side].sum(axis=1), side.shape[1] - 1)[~whole]
        least = int(counts.min()) if len(counts) else 0
        for group in side[~whole]:
            gone = group[decision.removed[group]]
            decision.keep(gone[least:], reason)


def kept_groups(decision: Decision, atoms: Atoms, channels: Channels) -> list[tuple[Ids, Ids]]:
    """For each group that stays, its rows in the whole weight and its columns within the group."""
    rows = ~decision.removed[atoms.roots(channels.rows)].reshape(channels.groups, -1)
    columns = ~decision.removed[atoms.roots(channels.columns)].reshape(channels.groups, -1)
    height = rows.shape[1]
    return [
        (np.flatnonzero(rows[g]) + g * height, np.flatnonzero(columns[g]))
        for g in range(channels.groups)
        if rows[g].any() and columns[g].any()
    ]
