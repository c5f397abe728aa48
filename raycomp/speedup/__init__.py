"""From masks to a smaller model with the same outputs; what goes together; real int8; export; measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raycomp.config.registry import absent
from raycomp.results.summary import Unpruned, Verification
from raycomp.speedup.analysis.dependency import Dependencies, TracedModel, dependencies
from raycomp.speedup.analysis.study import Group
from raycomp.speedup.config_list import (
    align_followers,
    auto_set_denpendency_group_ids,
    auto_set_dependency_group_ids,
    complete_config_list,
    obstacles,
)
from raycomp.speedup.rules import RULES, Registry, Rule
from raycomp.speedup.speedup import ModelSpeedup, UnprunedWarning
from raycomp.speedup.surgery.apply import apply_plan
from raycomp.speedup.surgery.follow_calibration import cut_calibration
from raycomp.speedup.surgery.follow_masks import remaining_masks, restored_mask, with_value_masks
from raycomp.speedup.surgery.plan import Plan
from raycomp.speedup.verify import draws, verify

__all__ = [
    "RULES",
    "Dependencies",
    "Group",
    "ModelSpeedup",
    "Plan",
    "Registry",
    "Rule",
    "TracedModel",
    "Unpruned",
    "UnprunedWarning",
    "Verification",
    "align_followers",
    "apply_plan",
    "auto_set_denpendency_group_ids",
    "auto_set_dependency_group_ids",
    "complete_config_list",
    "cut_calibration",
    "dependencies",
    "draws",
    "obstacles",
    "remaining_masks",
    "restored_mask",
    "verify",
    "with_value_masks",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        raise absent(__name__, name, __all__)
