"""What a task gave before its training, for its methods that fail after it: the training must not be lost to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from raycomp.errors import TaskError

_OF_USE = ("model", "teacher", "example_input")


class _Earlier:
    def __init__(self) -> None:
        self.given: dict[tuple[str, int], Any] = {}
        self.told: list[str] | None = None


_earlier: ContextVar[_Earlier | None] = ContextVar("_earlier", default=None)


@contextmanager
def kept_for_the_ending() -> Iterator[None]:
    """Within the block, which holds one job, what its task gives first is kept, a copy of each."""
    token = _earlier.set(_Earlier())
    try:
        yield
    finally:
        _earlier.reset(token)


@contextmanager
def standing_in() -> Iterator[list[str]]:
    """Within the block, what was kept stands in for what fails; gives the list of what is to be told of that."""
    earlier, told = _earlier.get(), list[str]()
    if earlier is None:
        yield told
        return
    earlier.told = told
    try:
        yield told
    finally:
        earlier.told = None


def keep(method: str, seed: int, found: Any) -> None:
    """Keeps what a method of the task's gave, where the ending will need it and it can be copied."""
    earlier = _earlier.get()
    if earlier is None or earlier.told is not None or method not in _OF_USE or (method, seed) in earlier.given:
        return
    try:
        earlier.given[method, seed] = copy.deepcopy(found)
    except Exception:  # whatever a user's class raises where it can't be copied: then there is none
        return


def stand_in(method: str, seed: int, error: TaskError) -> Any:
    """What a method gave earlier.

    Raises:
        TaskError: the one given, if there is nothing, or training is still to come.
    """
    earlier = _earlier.get()
    if earlier is None or earlier.told is None or (method, seed) not in earlier.given:
        raise error
    note = f"{error}: what {method}() gave before the training stands in"
    if note not in earlier.told:
        earlier.told.append(note)
    return copy.deepcopy(earlier.given[method, seed])
