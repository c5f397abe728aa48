"""Tables that are looked up by index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms, Ids
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.rules.base import RULES, NewAttribute, Rule, Sizes


class Embedding(Rule):
    """Rows of a table: its columns can go, its rows can't."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        weight, indices = call.arguments["weight"], call.arguments["indices"]
        atoms.fix_dim(weight, 0, f"{call.label} looks its rows up")
        for dim in range(indices.ndim):
            atoms.same(indices, dim, call.output, dim)
        atoms.same(weight, 1, call.output, call.output.ndim - 1)

    def makes(self, call: Call, atoms: Atoms) -> Ids:
        return atoms.ids(call.output, call.output.ndim - 1)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        weight, indices = call.arguments["weight"], call.arguments["indices"]
        columns = (flow.live(weight).sum(dim=0) > 0).float()
        return [given[indices].unsqueeze(-1) * columns + given[weight].mean(dim=0)]

    def attributes(self, call: Call, sizes: Sizes) -> Iterator[NewAttribute]:
        weight = call.arguments["weight"]
        yield NewAttribute(call.owner, "embedding_dim", weight.shape[1], sizes(weight, 1))


RULES.register(Embedding(), "aten.embedding")
