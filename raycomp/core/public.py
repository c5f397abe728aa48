"""What users construct: arguments are judged by name and kind before anything happens, and NNI's calls are answered."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from raycomp.config import nearest, nni
from raycomp.errors import ConfigError, Problem

_NO_BASE = "write an algorithm: L1NormPruner can hold stored masks, PtqQuantizer a stored calibration"


class Public:
    """The base of compressors, evaluators and speedup.

    Raises:
        ConfigError: with all arguments that the class lacks, or that are of the wrong kind, and what to write.
        AttributeError: of what NNI's objects have and these lack, with what to write.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        problems = list(_problems(cls, args, kwargs))
        if problems:
            raise ConfigError(problems)
        return super().__new__(cls)

    @classmethod
    def argument_problems(cls, arguments: Mapping[str, Any]) -> Iterator[Problem]:
        """What is wrong with the values of arguments, each by itself."""
        yield from ()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in nni.ATTRIBUTES:
                return object.__getattribute__(self, name)
            raise AttributeError(f"{type(self).__name__} has no {name} ({nni.ATTRIBUTES[name]})")


def _problems(cls: type[Public], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Problem]:
    if inspect.isabstract(cls):
        yield Problem(cls.__name__, "it is the base of others and does nothing by itself", _NO_BASE)
        return
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    kinds = {each.kind for each in parameters}
    names = [each.name for each in parameters]
    by_place = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in (each for each in kwargs if each not in names):
            remedy = nni.ARGUMENTS.get(name) or nearest(name, names)
            yield Problem(cls.__name__, f"it has no argument '{name}'", remedy)
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(args) > len(by_place):
        message = f"{len(args)} arguments are given by position, it takes {', '.join(by_place)}"
        yield Problem(cls.__name__, message, "give others by name")
    yield from cls.argument_problems({**dict(zip(by_place, args, strict=False)), **kwargs})
