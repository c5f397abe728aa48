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


def test_turns_become_stages_that_reach_the_goal_together() -> None:
    """1 - (1 - 0.5) ** (1/2) of what is left each time where it is cut, and quantizers in the last turn alone."""
    turns = {"type": "AutoCompressPruner", "pruner": tiny.pruner("L1NormPruner"), "total_iteration": 2}
    cut = parse_job(tiny.job(turns, tiny.quantizer())).stages
    assert [stage.name for stage in cut] == ["fused-1", "fused-2"]
    assert [[each.type for each in stage.compressors] for stage in cut] == [
        ["SimulatedAnnealingPruner"],
        ["SimulatedAnnealingPruner", "QATQuantizer"],
    ]
    ratios = [stage.compressors[0].pruner.config_list[0].sparse_ratio for stage in cut]  # type: ignore[attr-defined]
    assert ratios == pytest.approx([1 - 0.5**0.5] * 2)
    raw = tiny.job(turns)
    raw["stages"][0]["speedup"] = False
    kept = [each.compressors[0].pruner.config_list[0].sparse_ratio for each in parse_job(raw).stages]  # type: ignore[attr-defined]
    assert kept == pytest.approx([1 - 0.5**0.5, 0.5])
