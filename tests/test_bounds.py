"""The versions that `.ci/lowest` tests with are the lower bounds of pyproject.toml, every one of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [Requirement(text) for text in (*project["dependencies"], *extras["int8"], *extras["examples"])]
    bounds = {each.name: Version(next(s.version for s in each.specifier if s.operator == ">=")) for each in required}
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tests" / "constraints-lowest.txt").read_text(), re.M)
    assert {name: Version(version) for name, version in pins} == bounds
