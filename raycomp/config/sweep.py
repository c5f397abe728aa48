"""What a sweep says: a job, and a search space over its keys."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from raycomp.config.base import Conflict, Given, Settings
from raycomp.config.values import PATHS, Count, Json, KeyPath, Seed, SomeItems, Text, expects, parse_path

_T = TypeVar("_T", int, float)
_KINDS = ("grid", "choice", "uniform", "loguniform", "randint")
# A sweep gives each trial a name and a folder of its own, and runs all of them on one cluster.
_NOT_SEARCHED = ("name", "storage", "cluster")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _rising(pair: tuple[_T, _T]) -> tuple[_T, _T]:
    if pair[0] >= pair[1]:
        raise ValueError("it doesn't rise")
    return pair


def _positive(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] <= 0:
        raise ValueError("it isn't positive")
    return pair


_Range = Annotated[
    tuple[float, float],
    BeforeValidator(_as_tuple),
    AfterValidator(_rising),
    expects("two numbers that rise: [low, high]"),
]
_LogRange = Annotated[
    tuple[float, float],
    BeforeValidator(_as_tuple),
    AfterValidator(_rising),
    AfterValidator(_positive),
    expects("two numbers above 0 that rise: [low, high]"),
]
_IntRange = Annotated[
    tuple[int, int],
    BeforeValidator(_as_tuple),
    AfterValidator(_rising),
    expects("two whole numbers that rise: [low, high]"),
]


class SearchConfig(Settings):
    """The values that one key of the job takes: exactly one of these."""

    grid: SomeItems[Json] | None = None
    """Each of these values, with each of all other grids'."""
    choice: SomeItems[Json] | None = None
    """One of these values, drawn."""
    uniform: _Range | None = None
    """A number drawn evenly from [low, high)."""
    loguniform: _LogRange | None = None
    """A number from [low, high) whose logarithm is drawn evenly."""
    randint: _IntRange | None = None
    """A whole number drawn from low up to, not including, high, as Ray Tune has it."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        found = [kind for kind in _KINDS if given.has(kind)]
        if len(found) > 1:
            yield Conflict((found[1],), f"it stands beside {found[0]}", f"exactly one of {', '.join(_KINDS)}")
        elif not found and not set(given.values) - set(_KINDS):
            yield Conflict((), "it gives no values", f"exactly one of {', '.join(_KINDS)}")

    def draw(self, generator: random.Random) -> JsonValue:
        """A value of a key that isn't a grid."""
        if self.choice is not None:
            return generator.choice(self.choice)
        if self.uniform is not None:
            return generator.uniform(*self.uniform)
        if self.loguniform is not None:
            low, high = self.loguniform
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        assert self.randint is not None
        return generator.randrange(*self.randint)

    def probes(self) -> Iterator[tuple[KeyPath, JsonValue]]:
        """The values to check, each with its key path: all of a list, the least and the greatest of a range."""
        for kind in ("grid", "choice"):
            for index, value in enumerate(getattr(self, kind) or ()):
                yield (kind, index), value
        for kind in ("uniform", "loguniform"):
            if (ends := getattr(self, kind)) is not None:
                yield (kind, 0), ends[0]
                yield (kind, 1), math.nextafter(ends[1], ends[0])
        if self.randint is not None:
            yield ("randint", 0), self.randint[0]
            yield ("randint", 1), self.randint[1] - 1


class SweepConfig(Settings):
    """A job over a search space."""

    job: Annotated[
        Text | dict[str, Json],
        expects("the path of a job file, relative to this file, or the keys of a job themselves"),
    ]
    """The job: the path of its file, relative to this file, or its keys."""
    search: Annotated[dict[Text, SearchConfig], Field(min_length=1)]
    """Which keys of the job are searched, written such as training.seed or stages.0.training.epochs."""
    num_samples: Count = 1
    """How often values are drawn for the keys that aren't grids; equal draws are one trial."""
    seed: Seed = 0
    """Seeds the draws."""
    max_concurrent_trials: Count | None = None
    """Trials that run at once (null: as many as the cluster holds workers for)."""
    metric: Text | None = None
    """The metric that is compared (null: the task's first)."""
    mode: Annotated[Literal["max", "min"], expects("'max' or 'min'")] = "max"
    """Whether more or less of the metric is better."""

    def most_trials(self) -> int:
        """Combinations of the grids, as often as there are draws."""
        return self.num_samples * math.prod(len(search.grid) for search in self.search.values() if search.grid)

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        search = given.child("search").values
        seen: dict[KeyPath, str] = {}
        for key in search:
            path = parse_path(str(key))
            if not path:
                if key:
                    yield Conflict(("search", key), "it is no path of keys", PATHS)
                continue
            if path[:1] and path[0] in _NOT_SEARCHED:
                yield Conflict(("search", key), f"a sweep sets {path[0]} itself", "search another key")
            for other, spelling in seen.items():
                shared = min(len(path), len(other))
                if path[:shared] == other[:shared]:
                    yield Conflict(("search", key), f"it sets what '{spelling}' sets, too", "leave one of them out")
            seen[path] = str(key)
        grids_alone = bool(search) and all(Given(value).has("grid") for value in search.values())
        if grids_alone and (given.number("num_samples") or 1) > 1:
            yield Conflict(
                ("num_samples",),
                "a grid repeated gives the same trials, and equal trials give equal models",
                "leave it out; for repeats search training.seed",
            )
