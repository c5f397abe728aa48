"""A sweep's trials, drawn from its search space; every trial's job is checked before any of them runs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from raycomp.config.base import problems_of
from raycomp.config.change import set_key
from raycomp.config.job import JobConfig
from raycomp.config.loader import load_job_file, parse_job, read_job, with_task
from raycomp.config.sweep import SweepConfig
from raycomp.config.values import format_path, parse_path, shown
from raycomp.errors import ConfigError, Problem

_MOST_TRIALS = 1_000


@dataclass(frozen=True)
class Trial:
    """One point of the search space.

    Args:
        id: its number, as text.
        settings: searched key → value, the keys as the sweep spells them.
        job: the job with these values.
    """

    id: str
    settings: dict[str, JsonValue]
    job: JobConfig


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with all its trials, every job of which is right.

    Args:
        config: the sweep's settings.
        job: the job without the search.
        base_dir: what the task's path is relative to.
        trials: in order; the same settings give the same trials.
    """

    config: SweepConfig
    job: JobConfig
    base_dir: Path
    trials: tuple[Trial, ...]

    def digest(self) -> str:
        """The sha256, in hex, of what its results depend on."""
        trials = [[trial.id, trial.settings, trial.job.result_digest()] for trial in self.trials]
        content = [self.config.metric, self.config.mode, trials]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_sweep(path: str | Path, task: Mapping[str, Any] | None = None) -> SweepPlan:
    """The sweep that a file describes.

    Args:
        path: the file's.
        task: what stands in the job's `task` entry, whatever its file says of it.

    Raises:
        ConfigError: with everything that is wrong with the file, its job, and the job of any trial.
    """
    raw, source = read_job(path)
    return _Planner(raw, source.locate, Path(path).resolve().parent, task).plan()


def parse_sweep(
    config: SweepConfig | Mapping[str, Any], base_dir: str | Path = ".", task: Mapping[str, Any] | None = None
) -> SweepPlan:
    """The sweep that settings or plain values describe.

    Args:
        config: the sweep.
        base_dir: what the job file's path, or an inline job's task, is relative to.
        task: as in `load_sweep`.

    Raises:
        ConfigError: as `load_sweep`.
    """
    raw = config.model_dump(mode="json", exclude_unset=True) if isinstance(config, SweepConfig) else config
    return _Planner(raw, lambda path: format_path(path, "sweep"), Path(base_dir).resolve(), task).plan()


class _Planner:
    """Checks a sweep's plain values from the outside in, and gathers what is wrong."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        locate: Callable[[Sequence[str | int]], str],
        folder: Path,
        task: Mapping[str, Any] | None,
    ) -> None:
        self.raw, self.locate, self.folder, self.task = raw, locate, folder, task
        self.problems: list[Problem] = []

    def plan(self) -> SweepPlan:
        config = self._config()
        base = self._base(self.raw.get("job"))
        if config is not None and base is not None:
            self._check_values(config, base[0])
        self._raise()
        assert config is not None and base is not None
        values, base_dir = base
        trials = tuple(self._trials(config, values))
        self._raise()
        return SweepPlan(config, parse_job(values), base_dir, trials)

    def _raise(self) -> None:
        if self.problems:
            raise ConfigError(dict.fromkeys(self.problems))

    def _config(self) -> SweepConfig | None:
        try:
            return SweepConfig.model_validate(dict(self.raw))
        except ValidationError as error:
            self.problems += problems_of(error, self.raw, self.locate)
            return None

    def _base(self, job: object) -> tuple[Mapping[str, Any], Path] | None:
        """The job's plain values, and what its task's path is relative to; None where it is not right."""
        try:
            if isinstance(job, str) and job:
                path = self.folder / job
                return load_job_file(path, self.task).raw, path.resolve().parent
            if isinstance(job, Mapping):
                values = with_task(job, self.task)
                parse_job(values, where="")
                return values, self.folder
        except ConfigError as error:
            self.problems += [self._of_job(job, item) for item in error.problems]
        return None

    def _of_job(self, job: object, problem: Problem) -> Problem:
        """A problem of the job, in the sweep file where the job stands there or names a file that can't be read."""
        if isinstance(job, Mapping):
            return replace(problem, where=self.locate(("job", *parse_path(problem.where))))
        if ":" in problem.where.removeprefix(str(self.folder / str(job))):
            return problem
        return replace(problem, where=self.locate(("job",)), message=f"got {shown(job)}: {problem.message}")

    def _check_values(self, config: SweepConfig, base: Mapping[str, Any]) -> None:
        """Each value of each key, with the job's own values for all other keys."""
        for key, search in config.search.items():
            for where, value in search.probes():
                try:
                    values = set_key(base, key, value)
                except ConfigError as error:
                    located = self.locate(("search", key))
                    self.problems += [Problem(located, item.message, item.remedy) for item in error.problems]
                    break
                located = self.locate(("search", key, *where))
                self.problems += [
                    Problem(located, _message(problem, key), problem.remedy) for problem in _problems(values)
                ]

    def _trials(self, config: SweepConfig, base: Mapping[str, Any]) -> Iterator[Trial]:
        """Each combination; what is wrong with one is said for the first that has it."""
        if (many := config.most_trials()) > _MOST_TRIALS:
            where = self.locate(("search",))
            self.problems.append(Problem(where, f"it makes {many:,} trials", f"should be at most {_MOST_TRIALS:,}"))
            return
        points = list(_points(config))
        width = max(2, len(str(len(points) - 1)))
        told: set[Problem] = set()
        for index, settings in enumerate(points):
            values = dict(base)
            for key, value in settings.items():
                values = set_key(values, key, value)
            found = _problems(values)
            for problem in found:
                if problem not in told:
                    together = ", ".join(f"{key}={value}" for key, value in settings.items())
                    message = f"with {together}: {problem.where}: {problem.message}"
                    self.problems.append(Problem(self.locate(("search",)), message, problem.remedy))
            told.update(found)
            if not found:
                yield Trial(f"{index:0{width}d}", settings, parse_job(values))


def _points(config: SweepConfig) -> Iterator[dict[str, JsonValue]]:
    """All different settings: every combination of the grids, as often as there are draws."""
    generator = random.Random(config.seed)
    grids = {key: search.grid for key, search in config.search.items() if search.grid is not None}
    seen: set[str] = set()
    for _ in range(config.num_samples):
        for combination in product(*grids.values()):
            fixed = dict(zip(grids, combination, strict=True))
            settings = {
                key: fixed[key] if key in fixed else search.draw(generator) for key, search in config.search.items()
            }
            text = json.dumps(settings, sort_keys=True)
            if text not in seen:
                seen.add(text)
                yield settings


def _problems(values: Mapping[str, Any]) -> tuple[Problem, ...]:
    try:
        parse_job(values, where="")
    except ConfigError as error:
        return error.problems
    return ()


def _message(problem: Problem, key: str) -> str:
    """The problem's message, with its key path where that isn't the searched one."""
    return problem.message if parse_path(problem.where) == parse_path(key) else f"{problem.where}: {problem.message}"
