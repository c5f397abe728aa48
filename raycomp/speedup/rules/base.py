"""What an operator's rule says, and the registry that finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms, Ids
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value

Bools = NDArray[np.bool_]
Sizes = Callable[[Value, int], int]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Absorption:
    """How a contraction absorbs constants of removed inputs into its bias.

    Args:
        weight: the weight.
        bias: the bias, where there is one.
        module: the path of the module that may get a bias, where there is none; None if it can't.
        matrix: [outputs, inputs], float64: what one unit of an input adds to each output.
        constants: [inputs]: the inputs' constants, 0 where an input adds nothing.
        outputs: the atoms of the outputs.
    """

    weight: Value
    bias: Value | None
    module: str | None
    matrix: NDArray[np.float64]
    constants: NDArray[np.float64]
    outputs: Ids


@dataclass(frozen=True)
class Sink:
    """Where a dimension is contracted away: its coordinates may only go if they add nothing there.

    Args:
        ids: the atoms of the dimension.
        blocked: coordinates that can't go, each mask with its reason.
        approximate: like `blocked`, for what stands in the way of an exact result only.
        absorption: how constants are absorbed, where there are any.
    """

    ids: Ids
    blocked: Sequence[tuple[Bools, str]]
    approximate: Sequence[tuple[Bools, str]] = ()
    absorption: Absorption | None = None


@dataclass(frozen=True)
class Channels:
    """A grouped convolution: every group keeps equally many inputs and equally many outputs.

    Args:
        weight: its weight: rows of one side, and for each group other columns of the other side.
        rows: atoms of the weight's first dimension.
        columns: atoms of the other side, all groups one after the other.
        groups: the number of groups.
        label: its name in messages.
    """

    weight: Value
    rows: Ids
    columns: Ids
    groups: int
    label: str


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates, and the dimensions in proportion to whose sizes they are.

    Args:
        macs: for the whole example.
        dims: atoms of each dimension.
    """

    macs: int
    dims: tuple[Ids, ...]


@dataclass(frozen=True)
class NewAttribute:
    """An attribute of the calling module that states a size."""

    module: str
    name: str
    old: int
    new: int


class Rule:
    """What speedup has to know about an operator.

    The default is what holds for every operator: each output depends on each input, and no size may change.
    """

    sized = False
    """Whether calls state sizes that the user's code may have as constants (a view, a split)."""
    resized_operator: str | None = None
    """The operator that replaces the call's when its sizes change, where it is another one."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        """Unites the atoms of coordinates that go together, and fixes those that can't go."""
        reason = f"raycomp has no speedup rule for {call.operator}"
        for value in (*call.inputs, *call.outputs):
            atoms.fix_value(value, reason)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        """Carries non-negative numbers from inputs to outputs.

        Linear in `given`; an output element is positive exactly when (or, to be safe, also when not) it depends on an
        input element that is positive. Both directions of `raycomp.speedup.graph.flow` follow from it.
        """
        total = sum(((given[v].mean() if given[v].numel() else torch.zeros(())) for v in call.inputs), torch.zeros(()))
        return [total.expand(value.shape) for value in call.outputs]

    def sinks(self, call: Call, atoms: Atoms, flow: Flow) -> Iterable[Sink]:
        """The dimensions that the call contracts away."""
        return ()

    def makes(self, call: Call, atoms: Atoms) -> Ids:
        """The atoms of channels that a layer makes from others, by its weight."""
        return np.empty(0, dtype=np.int64)

    def channels(self, call: Call, atoms: Atoms) -> Iterable[Channels]:
        """Coordinates that must go in equal numbers."""
        return ()

    def work(self, call: Call, atoms: Atoms) -> Work | None:
        """What the call multiplies, as far as that follows the sizes of dimensions."""
        return None

    def attributes(self, call: Call, sizes: Sizes) -> Iterator[NewAttribute]:
        """The sizes that the calling module states, for the new sizes of values."""
        return iter(())

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        """The arguments that change with the sizes of values."""
        return {}


class Kept:
    """Which coordinates of the values stay.

    Args:
        atoms: the atoms of the values.
        removed: for each atom, whether it goes.
    """

    def __init__(self, atoms: Atoms, removed: Bools) -> None:
        self._atoms = atoms
        self._removed = removed

    def mask(self, value: Value, dim: int) -> Bools:
        """For each coordinate of a dimension, whether it stays."""
        return self.of(self._atoms.ids(value, dim))

    def of(self, ids: Ids) -> Bools:
        """For each atom, whether it stays."""
        stays: Bools = ~self._removed[self._atoms.roots(ids)]
        return stays

    def size(self, value: Value, dim: int) -> int:
        """The new size of a dimension."""
        return int(self.mask(value, dim).sum())

    def shape(self, value: Value) -> tuple[int, ...]:
        """The new shape."""
        return tuple(self.size(value, dim) for dim in range(value.ndim))


class Registry:
    """Rules by operator name: `aten.conv2d` for all overloads, `aten.max.other` for one."""

    def __init__(self, rules: Mapping[str, Rule] | None = None) -> None:
        self._rules = dict(rules or {})

    def register(self, rule: Rule, *operators: str) -> None:
        """Sets the rule of operators.

        Raises:
            ValueError: an operator has a rule already.
        """
        for operator in operators:
            if operator in self._rules:
                raise ValueError(f"{operator} has a speedup rule already: {type(self._rules[operator]).__name__}")
            self._rules[operator] = rule

    def extended(self, rules: Mapping[str, Rule]) -> Registry:
        """A copy with further rules, which come before those that are there."""
        return Registry({**self._rules, **rules})

    def find(self, call: Call) -> Rule:
        """The rule of a call's overload or operator; for an unknown one, the rule under which nothing can go.

        Whatever the rule raises comes as a `RuleError`.
        """
        return _Watched(self._rules.get(str(call.target)) or self._rules.get(call.operator, _UNKNOWN))

    def __contains__(self, operator: str) -> bool:
        return operator in self._rules


_UNKNOWN = Rule()
RULES = Registry()


class RuleError(Exception):
    """A rule raised for a call; the cause is the error's `__cause__`."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.label)
        self.call = call


class _Watched(Rule):
    """A rule whose errors say which call they came from."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.sized, self.resized_operator = rule.sized, rule.resized_operator

    def relate(self, call: Call, atoms: Atoms) -> None:
        with _errors_of(call):
            self._rule.relate(call, atoms)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        with _errors_of(call):
            results = self._rule.influence(call, given, flow)
            shapes = [tuple(result.shape) for result in results]
            if shapes != [value.shape for value in call.outputs]:
                raise ValueError(f"influence gives the shapes {shapes}")
            return results

    def sinks(self, call: Call, atoms: Atoms, flow: Flow) -> Iterable[Sink]:
        with _errors_of(call):
            return list(self._rule.sinks(call, atoms, flow))

    def makes(self, call: Call, atoms: Atoms) -> Ids:
        with _errors_of(call):
            return self._rule.makes(call, atoms)

    def channels(self, call: Call, atoms: Atoms) -> Iterable[Channels]:
        with _errors_of(call):
            return list(self._rule.channels(call, atoms))

    def work(self, call: Call, atoms: Atoms) -> Work | None:
        with _errors_of(call):
            return self._rule.work(call, atoms)

    def attributes(self, call: Call, sizes: Sizes) -> Iterator[NewAttribute]:
        with _errors_of(call):
            return iter(list(self._rule.attributes(call, sizes)))

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        with _errors_of(call):
            return self._rule.resize(call, kept)


@contextmanager
def _errors_of(call: Call) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuleError(call) from error


class _Broken(Rule):
    """In place of a rule that raised: nothing that the operator touches can go."""

    def __init__(self, cause: BaseException | None) -> None:
        self._cause = f"{type(cause).__name__}: {cause}"

    def relate(self, call: Call, atoms: Atoms) -> None:
        for value in (*call.inputs, *call.outputs):
            atoms.fix_value(value, f"the speedup rule for {call.operator} raised {self._cause}")


def tolerating(rules: Registry, study: Callable[[Registry], Result]) -> Result:
    """Runs a study of a graph; an operator whose rule raises is left whole, and the study begins anew.

    Args:
        rules: the operators' rules.
        study: what is done with them.
    """
    broken: dict[str, Rule] = {}
    while True:
        try:
            return study(rules.extended(broken))
        except RuleError as error:
            operator = str(error.call.target)
            if operator in broken:
                raise
            broken[operator] = _Broken(error.__cause__)


def tensor_argument(call: Call, name: str) -> Value | None:
    """An argument that is a tensor, or None where it is absent."""
    value = call.arguments.get(name)
    return value if isinstance(value, Value) else None
