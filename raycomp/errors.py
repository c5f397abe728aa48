"""Every error that raycomp raises for a user: what went wrong, where, and how to mend it.

All of them survive pickling, because Ray carries them from workers to the driver. Their texts may quote a stranger's,
and steer no terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


def visible(text: str, *, lines: bool = False) -> str:
    """A text with a mark in place of everything that steers a terminal or turns the direction of writing.

    Args:
        text: of any origin.
        lines: whether line breaks and tabs stay; else they become spaces.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character, lines) for character in text)


def _shown(character: str, lines: bool) -> str:
    if character in "\n\t\r":
        return character if lines and character != "\r" else " "
    # Controls, surrogates, invisible formats; those that join letters stay.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"
    return "\ufffd" if hidden else character


class RaycompError(Exception):
    """The root of raycomp's errors.

    Args:
        message: what is wrong, with the value that is wrong.
        where: the place: a file and line, a key's path, a module's name, a URI.
        remedy: what would be right.
    """

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        mend = f" ({self.remedy})" if self.remedy else ""
        return visible(f"{place}{self.message}{mend}", lines=True)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(kind: type[RaycompError], state: dict[str, object]) -> RaycompError:
    error = kind.__new__(kind)
    Exception.__init__(error, state.get("message", ""))
    error.__dict__.update(state)
    return error


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration.

    Args:
        where: key path, with the line in the file where it is known: `job.yaml:12 stages[0].compressors[1].type`.
        message: what is wrong, with the value.
        remedy: what would be right (nearest names, the allowed range), or an empty string.
    """

    where: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" ({self.remedy})" if self.remedy else "")


class ConfigError(RaycompError):
    """A configuration that can't be run; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''}")

    def __str__(self) -> str:
        return visible("\n".join(str(problem) for problem in self.problems), lines=True)


class TaskError(RaycompError):
    """The user's task can't be imported, built, or raised while it ran."""


class CompressionError(RaycompError):
    """A compressor was used in a way that can't work: wrong order of calls, a missing evaluator, diverged state."""


class FoldError(CompressionError):
    """Modules that are fused don't run as one.

    Args:
        message: what uses which module's output.
        names: of the fused modules.
        remedy: what can be fused.
    """

    def __init__(self, message: str, names: tuple[str, ...], remedy: str) -> None:
        super().__init__(message, remedy=remedy)
        self.names = names


class NotFiniteError(CompressionError):
    """A loss, gradient, weight or statistic is infinite or no number.

    Args:
        message: which, and in which step.
        began: the layer, compressor or batch where it began; None where this process can't tell.
    """

    def __init__(self, message: str, *, began: str | None = None, remedy: str | None = None) -> None:
        super().__init__(f"{message}; it began in {began}" if began else message, remedy=remedy or _LESS)
        self.what = message
        self.began = began


_LESS = "look at that batch's values, or lower the learning rate"


class SpeedupError(RaycompError):
    """A model can't be traced, cut, verified, lowered or exported."""


class StorageError(RaycompError):
    """Storage can't be reached, read or written.

    Args:
        passing: whether the same may succeed a little later: the store is away, busy or out of order.
    """

    def __init__(
        self, message: str, *, where: str | None = None, remedy: str | None = None, passing: bool = False
    ) -> None:
        super().__init__(message, where=where, remedy=remedy)
        self.passing = passing


class ArtifactError(StorageError):
    """An artifact is not there, not whole, or not what its manifest says."""


class ClusterError(RaycompError):
    """Ray can't be reached, lacks the resources, or lost too many workers; or another process has the run."""
