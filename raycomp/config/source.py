"""Reads YAML files into plain values, and knows the line of each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raycomp.config.dialect import DEEPEST, JobLoader, LimitError
from raycomp.config.job import JobConfig
from raycomp.config.values import KeyPath, format_path, parse_path, shown
from raycomp.errors import ConfigError, Problem

_TYPES = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_MERGE = "tag:yaml.org,2002:merge"
_ROOTS = {(key,) for key in JobConfig.model_fields}
_OTHERWISE = "write a value of this type, or put it in quotes for a text"
_LONGEST = 200_000
_MOST_VALUES = 50_000


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

    def located(self, error: ConfigError) -> ConfigError:
        """The same problems; those of this file's keys with its name and their line."""
        return ConfigError(
            Problem(self._located(problem.where), problem.message, problem.remedy) for problem in error.problems
        )

    def _located(self, where: str) -> str:
        path = parse_path(where)
        return self.locate(path) if path[:1] in self.lines or path[:1] in _ROOTS else where


def read_yaml(path: str | Path) -> tuple[dict[str, Any], SourceMap, list[Problem]]:
    """A file's content as plain values, where its keys are, and what of it is no plain data or stands twice.

    Raises:
        ConfigError: the file can't be read, or is not a mapping in YAML.
    """
    file = str(path)
    loader, node = _composed(_text(Path(path)), file)
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


def read_value(text: str, where: str) -> Any:
    """The plain value that a piece of YAML stands for.

    Raises:
        ConfigError: it is not YAML, or no plain data.
    """
    try:
        loader, node = _composed(text, where)
        reader = _Reader(where, loader)
        value = None if node is None else reader.value(node, ())
        if reader.problems:
            raise ConfigError(reader.problems)
    except ConfigError as error:
        raise ConfigError(Problem(where, problem.message, problem.remedy) for problem in error.problems) from None
    return value


def _text(path: Path) -> str:
    """A file's text; errors as in `read_yaml`."""
    file = str(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ConfigError([Problem(file, f"it is longer than {_LONGEST:,} bytes", "write less in one file")])
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([Problem(file, "there is no such file", _yaml_files_beside(path))]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(file, f"it is not a text file: {error.reason} at byte {error.start}")]) from None
    except OSError as error:
        raise ConfigError([Problem(file, f"it can't be read: {error.strerror}")]) from None
    except ValueError as error:
        raise ConfigError([Problem(shown(file), f"there can be no such file: {error}")]) from None


def _composed(text: str, file: str) -> tuple[JobLoader, yaml.Node | None]:
    try:
        loader = JobLoader(text)
        return loader, loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (f":{mark.line + 1}", f" (column {mark.column + 1})") if mark else ("", "")
        what = error.problem if isinstance(error, LimitError) else f"it is not YAML: {error.problem}"
        raise ConfigError([Problem(f"{file}{line}", f"{what}{column}", error.note or "")]) from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        message, remedy = f"it is not YAML: the character {error.character:#x} can't stand there", "take it out"
        raise ConfigError([Problem(f"{file}:{number}", message, remedy)]) from None


def _yaml_files_beside(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder '{path.parent}', either"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"'{path.parent}' has {', '.join(names[:8])}" if names else f"'{path.parent}' has no YAML file"


@dataclass
class _Reader:
    """Turns YAML nodes into plain values, and notes lines and problems on the way."""

    file: str
    loader: JobLoader
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    open_nodes: list[yaml.Node] = field(default_factory=list)
    values: int = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.values += 1
        if node in self.open_nodes:
            self.report(node, path, "it holds itself", "take the alias out")
            return None
        if self.values > _MOST_VALUES or len(self.open_nodes) > DEEPEST:
            limit = f"{_MOST_VALUES:,} values" if self.values > _MOST_VALUES else f"{DEEPEST} levels"
            self.report(node, path, f"with what its aliases repeat, it has more than {limit}", "repeat less")
            raise ConfigError(self.problems)
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
            self.report(node, path, f"{shown(node.value)} is not of type {node.tag.rpartition(':')[2]}", _OTHERWISE)
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
                self.report(
                    key_node, (*path, key), f"the key {shown(key)} stands twice, first in line {first}", "keep one"
                )
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
