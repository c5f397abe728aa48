"""Job files, mappings and config lists as settings, with every problem at its key or line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import TypeAdapter, ValidationError

from raycomp.config.base import problems_of
from raycomp.config.entries import DistillEntry, Entry, PruneEntry, QuantizeEntry, SelectionEntry
from raycomp.config.job import JobConfig
from raycomp.config.source import SourceMap, read_yaml
from raycomp.config.turns import in_turns
from raycomp.config.values import format_path, shown
from raycomp.errors import ConfigError, Problem

_ENTRIES: Mapping[str, type[SelectionEntry]] = {
    "pruner": PruneEntry,
    "quantizer": QuantizeEntry,
    "distiller": DistillEntry,
}


@dataclass(frozen=True)
class JobFile:
    """A job file that is right.

    Args:
        job: what it describes.
        raw: its content as plain values.
        source: where its keys are.
    """

    job: JobConfig
    raw: Mapping[str, Any]
    source: SourceMap


def load_job_file(path: str | Path, task: Mapping[str, Any] | None = None) -> JobFile:
    """The job that a file describes, and where its keys are.

    Args:
        path: the file's.
        task: what stands in its `task` entry, whatever the file says of it.

    Raises:
        ConfigError: with everything that is wrong with the file, each with its line and key.
    """
    raw, source, problems = read_yaml(path)
    values = with_task(raw, task)
    try:
        job = JobConfig.model_validate(values)
    except ValidationError as error:
        unread = {problem.where for problem in problems}
        wrong = [problem for problem in problems_of(error, values, source.locate) if problem.where not in unread]
        found = sorted([*problems, *wrong], key=_line_of)
        raise ConfigError(found) from None
    if problems:
        raise ConfigError(problems)
    return JobFile(in_turns(job), values, source)


def load_job(path: str | Path) -> JobConfig:
    """The job that a file describes; errors as in `load_job_file`."""
    return load_job_file(path).job


def read_job(path: str | Path) -> tuple[dict[str, Any], SourceMap]:
    """A file's content as plain values, and where its keys are; checked as YAML only.

    Raises:
        ConfigError: the file can't be read, is not YAML, or holds a key twice.
    """
    raw, source, problems = read_yaml(path)
    if problems:
        raise ConfigError(problems)
    return raw, source


def parse_job(
    mapping: Mapping[str, Any] | JobConfig, where: str = "job", task: Mapping[str, Any] | None = None
) -> JobConfig:
    """The job that plain values describe.

    Args:
        mapping: its keys.
        where: what stands before the key of a problem.
        task: what stands in its `task` entry, whatever the mapping says of it.

    Raises:
        ConfigError: with everything that is wrong.
    """
    if isinstance(mapping, JobConfig):
        mapping = mapping.model_dump(mode="json")
    mapping = with_task(mapping, task)
    try:
        return in_turns(JobConfig.model_validate(mapping))
    except ValidationError as error:
        raise ConfigError(problems_of(error, mapping, lambda path: format_path(path, where))) from None


def with_task(raw: Mapping[str, Any], task: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A job's plain values with the keys of `task` in their entry of that name, where it is one that can hold them."""
    said = raw.get("task") or {} if isinstance(raw, Mapping) else None
    if task is None or not isinstance(said, Mapping):
        return raw
    return {**raw, "task": {**said, **task}}


def _line_of(problem: Problem) -> int:
    match = re.search(r":(\d+)( |$)", problem.where)
    return int(match[1]) if match else 0


@overload
def parse_config_list(kind: Literal["pruner"], config_list: object, where: str = ...) -> tuple[PruneEntry, ...]: ...
@overload
def parse_config_list(
    kind: Literal["quantizer"], config_list: object, where: str = ...
) -> tuple[QuantizeEntry, ...]: ...
@overload
def parse_config_list(
    kind: Literal["distiller"], config_list: object, where: str = ...
) -> tuple[DistillEntry, ...]: ...


def parse_config_list(
    kind: Literal["pruner", "quantizer", "distiller"], config_list: object, where: str = "config_list"
) -> tuple[Entry, ...] | tuple[PruneEntry, ...] | tuple[QuantizeEntry, ...] | tuple[DistillEntry, ...]:
    """The entries of a config list as a library user writes it: a sequence of mappings or entries.

    Raises:
        ConfigError: with everything that is wrong, each with its key behind `where`.
    """
    entry_class = _ENTRIES[kind]
    if not isinstance(config_list, Sequence) or isinstance(config_list, str | bytes) or not config_list:
        raise ConfigError([Problem(where, f"got {shown(config_list)}", "should be a list of at least one mapping")])
    values = list(config_list)
    adapter = TypeAdapter(list[entry_class])  # type: ignore[valid-type]
    try:
        return tuple(adapter.validate_python(values))
    except ValidationError as error:
        raise ConfigError(problems_of(error, values, lambda path: format_path(path, where))) from None
