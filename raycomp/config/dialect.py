"""The YAML of job files: YAML 1.2's plain scalars, so that `1e-4` is a number and `on` and `no` are texts."""

from __future__ import annotations

import re
from typing import Any

import yaml

DEEPEST = 50
"""Levels of lists and mappings in each other that a file may have."""
_PLAIN_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)


class LimitError(yaml.MarkedYAMLError):
    """YAML that is right, and larger than anyone's job."""


class JobLoader(yaml.SafeLoader):
    """Safe, with YAML 1.2's idea of plain scalars, and a limit of nesting.

    Raises:
        yaml.YAMLError: whatever is wrong with the text.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    _depth = 0

    def get_single_node(self) -> yaml.Node | None:
        try:
            return super().get_single_node()
        except (ValueError, OverflowError):
            # The scanner turns escapes and version numbers into characters and numbers, unchecked.
            message, remedy = "there is no such character", "escapes go up to \\U0010FFFF"
            raise yaml.scanner.ScannerError(None, None, message, self.get_mark(), remedy) from None

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            message = f"it is nested more than {DEEPEST} levels deep"
            raise LimitError(None, None, message, self.get_mark(), "nest less, or close the brackets")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class JobDumper(yaml.SafeDumper):
    """Quotes every text that JobLoader or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _PLAIN_SCALARS:
    for _class in (JobLoader, JobDumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""] if _tag == "null" else [*_first]
        )
