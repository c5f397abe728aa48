"""A budget says what speedup leaves: it needs what speedup goes by."""

from __future__ import annotations

from typing import Any

import pytest

from raycomp.config import parse_job
from raycomp.errors import ConfigError
from tests.contracts import tiny


def _job(compressor: dict[str, Any], **speedup: Any) -> dict[str, Any]:
    return {**tiny.job(compressor), "speedup": speedup}


BUDGET = {"type": "L1NormPruner", "config_list": [{"op_types": ["Conv2d"], "budget": {"macs": 0.5}}]}


@pytest.mark.parametrize("key", ["enabled", "align", "dependency_groups"])
@pytest.mark.parametrize("compressor", [BUDGET, {"type": "AMCPruner", "pruner": BUDGET}], ids=["alone", "searched"])
def test_a_budget_without_what_speedup_goes_by_is_a_conflict(compressor: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"job.speedup.{key}: a budget is of what speedup leaves, and {key} is off"):
        parse_job(_job(compressor, **{key: False}))
    assert parse_job(_job(compressor, **{key: True}))


def test_a_ratio_needs_none_of_it() -> None:
    assert parse_job(_job(tiny.pruner("L1NormPruner"), align=False, dependency_groups=False))
