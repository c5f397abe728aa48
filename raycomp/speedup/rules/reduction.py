"""Operators that reduce dimensions, or work along one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.rules.base import RULES, Rule, Sink


def _dims(call: Call) -> list[int]:
    given = call.arguments.get("dim")
    value = call.inputs[0]
    if given is None or given == []:
        return list(range(value.ndim))
    return [dim % max(value.ndim, 1) for dim in (given if isinstance(given, list) else [given])]


class Reduction(Rule):
    """Reduces dimensions to one number, which depends on how many there are (a mean) or on which (a maximum)."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        reduced = _dims(call)
        for dim in reduced:
            atoms.fix_dim(call.inputs[0], dim, f"{call.label} reduces over it")
        self._relate_rest(call, atoms, reduced)

    def _relate_rest(self, call: Call, atoms: Atoms, reduced: list[int]) -> None:
        value = call.inputs[0]
        rest = [dim for dim in range(value.ndim) if dim not in reduced]
        for output in call.outputs:
            kept_dims = output.ndim == value.ndim
            for index, dim in enumerate(rest):
                atoms.same(value, dim, output, dim if kept_dims else index)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        value = call.inputs[0]
        reduced = _dims(call)
        mixed = given[value].mean(dim=reduced, keepdim=True) if reduced else given[value]
        return [mixed.reshape(output.shape) for output in call.outputs]


class Sum(Reduction):
    """A sum doesn't miss what is zero."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        self._relate_rest(call, atoms, _dims(call))

    def sinks(self, call: Call, atoms: Atoms, flow: Flow) -> Iterable[Sink]:
        value = call.inputs[0]
        for dim in _dims(call):
            missed = flow.needed_along(value, dim) & ~flow.constants(value, dim).is_zero
            yield Sink(atoms.ids(value, dim), [(missed, f"{call.label} still uses it")])


class VectorNorm(Sum):
    """A norm of positive order doesn't miss what is zero, either."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        order = call.arguments.get("ord", call.arguments.get("p"))
        if isinstance(order, (int, float)) and order <= 0:
            Reduction.relate(self, call, atoms)
        else:
            super().relate(call, atoms)


class Along(Rule):
    """Mixes the elements along one dimension and keeps the shape: softmax, cumsum."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        value = call.inputs[0]
        for output in call.outputs:
            for dim in range(value.ndim):
                atoms.same(value, dim, output, dim)
        for dim in _dims(call):
            atoms.fix_dim(value, dim, f"{call.label} works along it")

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        taint = given[call.inputs[0]]
        mixed = taint + (taint.mean(dim=_dims(call), keepdim=True) if taint.ndim else torch.zeros(()))
        return [mixed for _ in call.outputs]


_REDUCTIONS = """
mean amax amin max min var std var_mean std_mean argmax argmin any all prod logsumexp median
nanmean
""".split()  # noqa: SIM905
_ALONG = "softmax log_softmax _softmax _log_softmax cumsum cumprod sort".split()  # noqa: SIM905

RULES.register(
    Reduction(),
    *(f"aten.{name}" for name in _REDUCTIONS),
)
RULES.register(Sum(), "aten.sum")
RULES.register(VectorNorm(), "aten.norm", "aten.linalg_vector_norm")
RULES.register(Along(), *(f"aten.{name}" for name in _ALONG))
