"""Calibration that follows the surgery: the scales of cut channels go with the channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raycomp.speedup.surgery.plan import ActivationCut, Cut, Plan

Calibration = Mapping[str, Mapping[str, Mapping[str, Any]]]


def cut_calibration(calibration: Calibration, plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """The calibration of the sped-up model.

    Args:
        calibration: by module and target, with `axis` where the scales belong to the coordinates of a dimension.
        plan: the surgery of the model that was calibrated.
    """
    return {
        module: {target: _cut_target(values, module, target, plan) for target, values in targets.items()}
        for module, targets in calibration.items()
    }


def _cut_target(values: Mapping[str, Any], module: str, target: str, plan: Plan) -> dict[str, Any]:
    result = dict(values)
    axis = values.get("axis")
    if axis is None:
        return result
    for each in _cuts(module, target, plan):
        for name, tensor in result.items():
            is_channelwise = isinstance(tensor, Tensor) and tensor.ndim > 0
            if is_channelwise and each.dim == axis and tensor.shape[axis] == each.size:
                result[name] = tensor.index_select(axis, torch.tensor(each.keep, device=tensor.device))
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
