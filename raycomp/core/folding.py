"""Modules that compute as one: the first hosts the others, which pass on what comes from it.

Which call is folded is told by what it is given, not by the module: one that runs a second time, on anything else,
computes as it always does. The host's own output doesn't exist any more, so whatever else would use it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raycomp.core.attach import TargetSpace
from raycomp.errors import FoldError

_KNOWN_OF_A_VALUE = ("shape", "dtype", "device", "ndim", "dim", "size", "requires_grad", "is_cuda")


class Folded:
    """What passes from a host through the modules that it hosts: the value behind the last of them.

    Args:
        value: what all of them together give.
        names: theirs, the host's first.
        passed: how many of them it has passed.
    """

    def __init__(self, value: Tensor, names: tuple[str, ...], passed: int = 1) -> None:
        self.value = value
        self.names = names
        self.passed = passed

    def through(self, name: str, value: Tensor) -> Any:
        """Behind the next module: the value itself behind the last one."""
        return value if self.passed + 1 == len(self.names) else folded(value, self.names, self.passed + 1)

    @property
    def next(self) -> str:
        """The module that it has to pass."""
        return self.names[self.passed]

    def misused(self, by: str) -> FoldError:
        """The error for anything else that is given it."""
        behind = self.names[self.passed - 1]
        return FoldError(
            f"{' + '.join(self.names)} are fused, and {by} uses what {behind} gives, which is then no more",
            self.names,
            f"fuse modules of which each alone is given what the one before it gives: here not {self.next}",
        )

    def __getattr__(self, name: str) -> Any:
        if name in _KNOWN_OF_A_VALUE:
            return getattr(self.value, name)
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.misused(f".{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [value for value in pytree.tree_leaves([args, kwargs or {}]) if isinstance(value, Folded)]
        raise found[0].misused(getattr(function, "__name__", str(function)))


class _AsTensor(Folded):
    """One that says it is a tensor, where a forward asks: it is told so, and passes it on."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` sees."""
        return Tensor


def folded(value: Tensor, names: tuple[str, ...], passed: int = 1) -> Folded:
    """A folded value; arguments as `Folded`. While a forward is traced there are only tensors that are."""
    kind = Folded if torch.compiler.is_compiling() else _AsTensor
    return kind(value, names, passed)


def _refused(name: str) -> Any:
    def operator(self: Folded, *others: Any) -> Any:
        raise self.misused(name.strip("_"))

    return operator


# Python looks operators up in the class.
for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "floordiv",
    "mod",
    "matmul",
    "pow",
    "neg",
    "abs",
    "getitem",
    "setitem",
    "iter",
    "len",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "bool",
    "float",
    "int",
]:
    setattr(Folded, f"__{_name}__", _refused(_name))


class Hosting(nn.Module):
    """Put before the class of a host: what it gives must pass the modules that it hosts."""

    raycomp_fold_names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module, hooks included."""
        self.__dict__["raycomp_called"] = True
        try:
            return folded(super().__call__(*args, **kwargs), self.raycomp_fold_names)
        finally:
            self.__dict__["raycomp_called"] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own; errors where it is not called as a module, so that nobody knows what passes on."""
        self.check_call()
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def check_call(self) -> None:
        """Refuses a call of `forward` itself."""
        if not self.__dict__.get("raycomp_called"):
            names = self.raycomp_fold_names
            message = f"{' + '.join(names)} are fused, and the model calls {names[0]}.forward itself"
            raise FoldError(message, names, f"call {names[0]} as a module, or take it out of fuse_names")


class Hosted(nn.Module):
    """Put before the class of a hosted module: what comes from its host passes it unchanged, hooks included."""

    raycomp_own_names: frozenset[str]
    raycomp_passes: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module, hooks included."""
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(given, Folded):
            return super().__call__(*args, **kwargs)
        if given.next not in self.raycomp_own_names:
            raise given.misused(min(self.raycomp_own_names))
        kwargs = kwargs if args else dict.fromkeys(list(kwargs)[:1], given.value)
        self.__dict__["raycomp_passes"] = True
        try:
            value = super().__call__(*([given.value, *args[1:]] if args else ()), **kwargs)
        finally:
            self.__dict__["raycomp_passes"] = False
        return given.through(given.next, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What it is given, where that comes from its host."""
        if self.raycomp_passes:
            return args[0] if args else next(iter(kwargs.values()))
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def alone(self, value: Tensor) -> Tensor:
        """What the module itself makes of a value, without hooks."""
        return super().forward(value)  # type: ignore[misc, no-any-return]


def fold_calls(space: TargetSpace, names: Sequence[str], host: type[Hosting] = Hosting) -> None:
    """Lets the first named module host the others, until the space is detached. An activation may be hosted by several.

    Args:
        space: of the model.
        names: of the modules, in the order in which they run.
        host: put before the host's class.
    """
    for name in names[1:]:
        hosted = space.module(name)
        own: frozenset[str] = getattr(hosted, "raycomp_own_names", frozenset())
        if not own:
            space.swap_class(hosted, Hosted)
            space.on_detach(partial(_forget, hosted, "raycomp_own_names", "raycomp_passes"))
        hosted.__dict__["raycomp_own_names"] = own | {name}
        hosted.__dict__["raycomp_passes"] = False
    module = space.module(names[0])
    space.swap_class(module, host)
    module.__dict__["raycomp_fold_names"] = tuple(names)
    space.on_detach(partial(_forget, module, "raycomp_fold_names", "raycomp_called"))


def _forget(module: nn.Module, *names: str) -> None:
    for name in names:
        module.__dict__.pop(name, None)
