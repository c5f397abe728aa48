"""Reads job files and mappings into `JobConfig`, with every problem at its place in the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import yaml
from pydantic import TypeAdapter, ValidationError

from raycomp.config.base import problems_of, unknown_keys
from raycomp.config.dialect import JobLoader
from raycomp.config.entries import DistillEntry, Entry, PruneEntry, QuantizeEntry, SelectionEntry
from raycomp.config.job import JobConfig
from raycomp.config.values import KeyPath, format_path, shown
from raycomp.errors import ConfigError, Problem

_TYPES = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_MERGE = "tag:yaml.org,2002:merge"
_ENTRIES: Mapping[str, type[SelectionEntry]] = {
    "pruner": PruneEntry,
    "quantizer": QuantizeEntry,
    "distiller": DistillEntry,
}


@dataclass(frozen=True)
class SourceMap:
    """Where the keys of a file are.

    Args:
        file: the file as errors name it.
        lines: the line of each key path, from 1.
    """

    file: str
    lines: Mapping[KeyPath, int]

    def locate(self, path: Sequence[str | int]) -> str:
        """`job.yaml:12 stages[0].name`; for a key that is not in the file, the line of what should hold it."""
        known = tuple(path)
        while known and known not in self.lines:
            known = known[:-1]
        text = format_path(path)
        return f"{self.file}:{self.lines.get(known, 1)}" + (f" {text}" if text else "")

    def place(self, error: ConfigError) -> ConfigError:
        """The same problems, with the file and line in front of places that are key paths of this file."""
        return ConfigError(
            Problem(self._placed(problem.where), problem.message, problem.remedy) for problem in error.problems
        )

    def _placed(self, where: str) -> str:
        path = parse_path(where)
        return self.locate(path) if path[:1] in self.lines else where


def parse_path(text: str) -> KeyPath:
    """The inverse of `format_path`; also takes `stages.0.name`."""
    parts = re.findall(r"\[(\d+)\]|([^.\[\]]+)", text)
    return tuple(int(index or name) if (index or name.isdigit()) else name for index, name in parts)


@dataclass
class _Reader:
    """Turns YAML nodes into plain values, and notes lines and problems on the way."""

    file: str
    loader: JobLoader
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    open_nodes: list[yaml.Node] = field(default_factory=list)

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if node in self.open_nodes:
            self.report(node, path, "it holds itself", "take the alias out")
            return None
        if node.tag not in _TYPES:
            self.report(node, path, f"unknown type '{node.tag}'", "only plain data: take the tag out")
            return None
        self.open_nodes.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self.sequence(node, path)
            return self.scalar(node, path)
        finally:
            self.open_nodes.pop()

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError):
            self.report(node, path, f"'{node.value}' is not of type {node.tag.rpartition(':')[2]}")
            return None

    def sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.lines[(*path, index)] = item.start_mark.line + 1
            values.append(self.value(item, (*path, index)))
        return values

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                text = key_node.value if isinstance(key_node, yaml.ScalarNode) else "..."
                self.report(key_node, path, f"the key {text} is not a text", f"write '{text}' in quotes")
                continue
            key = key_node.value
            if key in values:
                first = self.lines[(*path, key)]
                self.report(key_node, (*path, key), f"the key '{key}' stands twice, first in line {first}", "keep one")
                continue
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            values[key] = self.value(value_node, (*path, key))
        for merged in self.merged(node, path):
            values = {**merged, **values}
        return values

    def merged(self, node: yaml.MappingNode, path: KeyPath) -> list[dict[str, Any]]:
        """What `<<` brings in; earlier ones win, and so does the mapping itself."""
        found = []
        for key_node, value_node in node.value:
            if key_node.tag != _MERGE:
                continue
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if isinstance(source, yaml.MappingNode):
                    own = dict(self.lines)
                    found.append(self.value(source, path) or {})
                    self.lines |= own
                else:
                    self.report(source, path, "'<<' takes a mapping, or a list of mappings")
        return found

    def report(self, node: yaml.Node, path: KeyPath, message: str, remedy: str = "") -> None:
        text = format_path(path)
        where = f"{self.file}:{node.start_mark.line + 1}" + (f" {text}" if text else "")
        self.problems.append(Problem(where, message, remedy))


def load_job(path: str | Path) -> JobConfig:
    """The job that a file describes.

    Raises:
        ConfigError: with everything that is wrong with the file, each with its line and key.
    """
    raw, source, problems = _read(path)
    try:
        job = JobConfig.model_validate(raw)
    except ValidationError as error:
        found = sorted([*problems, *problems_of(error, raw, source.locate)], key=_line_of)
        raise ConfigError(found, where=source.file) from None
    if problems:
        raise ConfigError(problems, where=source.file)
    return job


def read_job(path: str | Path) -> tuple[dict[str, Any], SourceMap]:
    """A file's content as plain values, and where its keys are; checked as YAML only.

    Raises:
        ConfigError: the file can't be read, is not YAML, or holds a key twice.
    """
    raw, source, problems = _read(path)
    if problems:
        raise ConfigError(problems, where=source.file)
    return raw, source


def parse_job(mapping: Mapping[str, Any], where: str = "job") -> JobConfig:
    """The job that plain values describe.

    Raises:
        ConfigError: with everything that is wrong, each with its key behind `where`.
    """
    try:
        return JobConfig.model_validate(mapping)
    except ValidationError as error:
        raise ConfigError(problems_of(error, mapping, lambda path: format_path(path, where)), where=where) from None


def _line_of(problem: Problem) -> int:
    match = re.search(r":(\d+)( |$)", problem.where)
    return int(match[1]) if match else 0


def _read(path: str | Path) -> tuple[dict[str, Any], SourceMap, list[Problem]]:
    file = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([Problem(file, "there is no such file", _yaml_files_beside(Path(path)))]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(file, f"it is not a text file: {error.reason} at byte {error.start}")]) from None
    except OSError as error:
        raise ConfigError([Problem(file, f"it can't be read: {error.strerror}")]) from None
    try:
        loader = JobLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (f":{mark.line + 1}", f" (column {mark.column + 1})") if mark else ("", "")
        raise ConfigError([Problem(f"{file}{line}", f"it is not YAML: {error.problem}{column}")]) from None
    except yaml.YAMLError as error:
        raise ConfigError([Problem(file, f"it is not YAML: {' '.join(str(error).split())}")]) from None
    if not isinstance(node, yaml.MappingNode):
        what = (
            "it is empty"
            if node is None
            else f"got {shown(node.value) if isinstance(node, yaml.ScalarNode) else 'a list'}"
        )
        raise ConfigError([Problem(f"{file}:1", what, "should be a mapping with name, task, stages and training")])
    reader = _Reader(file, loader)
    raw = reader.value(node, ())
    return raw, SourceMap(file, reader.lines), reader.problems


def _yaml_files_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder '{path.parent}', either"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"'{path.parent}' has {', '.join(names[:8])}" if names else f"'{path.parent}' has no YAML file"


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
        raise ConfigError(problems_of(error, values, lambda path: format_path(path, where)), where=where) from None


def set_key(mapping: Mapping[str, Any], key_path: str, value: Any) -> dict[str, Any]:
    """A copy of a job's plain values with one key set.

    Args:
        key_path: `stages.0.compressors.0.pruner.config_list.0.sparse_ratio`, or the same with brackets.

    Raises:
        ConfigError: a job has no such key.
    """
    path = parse_path(key_path)
    if not path:
        raise ConfigError([Problem(key_path, "it names no key", "should be such as training.seed")])
    result = deepcopy(dict(mapping))
    holder: Any = result
    for position, part in enumerate(path):
        last = position == len(path) - 1
        place = format_path(path[: position + 1])
        if isinstance(part, int) and isinstance(holder, list):
            if part >= len(holder):
                raise ConfigError([Problem(key_path, f"{place} is not there", f"the list has {len(holder)} items")])
        elif isinstance(part, str) and isinstance(holder, dict):
            holder.setdefault(part, {})
        else:
            raise ConfigError([Problem(key_path, f"{place} is not there", _what_is(holder))])
        if last:
            holder[part] = value
        else:
            holder = holder[part]
    _refuse_unknown(result, path, key_path)
    return result


def _what_is(holder: Any) -> str:
    if isinstance(holder, list):
        return f"it is a list: a number below {len(holder)} comes here"
    return "it is a mapping: a key comes here" if isinstance(holder, dict) else f"there is {shown(holder)} already"


def _refuse_unknown(mapping: Mapping[str, Any], path: KeyPath, key_path: str) -> None:
    try:
        JobConfig.model_validate(mapping)
    except ValidationError as error:
        for unknown, remedy in unknown_keys(error, mapping):
            if unknown == path[: len(unknown)]:
                raise ConfigError([Problem(key_path, f"a job has no key {format_path(unknown)}", remedy)]) from None
