"""Calibration that follows the surgery: the scales of cut channels go with the channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raycomp.core.calibration import canonical_calibration
from raycomp.speedup.surgery.plan import ActivationCut, Cut, Plan

Calibration = Mapping[str, Mapping[str, Mapping[str, Any]]]


def cut_calibration(calibration: Calibration, plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """The calibration of the sped-up model.

    Args:
        calibration: by module and target; scales have the target's rank where they belong to its channels.
        plan: the surgery of the model that was calibrated.

    Raises:
        CompressionError: the calibration is none: another form, or numbers that no range has.
    """
    return {
        module: {target: _cut_target(values, module, target, plan) for target, values in targets.items()}
        for module, targets in canonical_calibration(calibration).items()
    }


def _cut_target(values: Mapping[str, Any], module: str, target: str, plan: Plan) -> dict[str, Any]:
    result = dict(values)
    for each in _cuts(module, target, plan):
        for name, tensor in result.items():
            # In the dimensions in which scales are the same for all, they have the size 1.
            if isinstance(tensor, Tensor) and tensor.ndim > each.dim and tensor.shape[each.dim] == each.size > 1:
                result[name] = tensor.index_select(each.dim, torch.tensor(each.keep, device=tensor.device))
    return result


def _cuts(module: str, target: str, plan: Plan) -> list[Cut | ActivationCut]:
    found: list[Cut | ActivationCut] = []
    for surgery in plan.surgeries:
        found += [c for c in surgery.cuts if c.tensor == f"{module}.{target}"]
        found += [c for c in surgery.activations if (c.module, c.target) == (module, target)]
        for block in surgery.block_cuts:
            if block.tensor == f"{module}.{target}":
                keep = tuple(row for each in block.blocks for row in each.rows)
                found.append(Cut(block.tensor, 0, block.shape[0], keep))
    return found
