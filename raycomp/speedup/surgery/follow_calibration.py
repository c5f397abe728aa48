"""Calibration that follows the surgery: the scales of cut channels go with the channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raycomp.core.calibration import canonical_calibration
from raycomp.speedup.surgery.plan import ActivationCut, BlockCut, Cut, Plan

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
        for name, value in result.items():
            if isinstance(value, Tensor):
                result[name] = _cut_blocks(value, each) if isinstance(each, BlockCut) else _cut_dim(value, each)
    return result


# In the dimensions in which scales are the same for all, they have the size 1, or are missing.


def _cut_dim(tensor: Tensor, cut: Cut | ActivationCut) -> Tensor:
    if tensor.ndim <= cut.dim or not tensor.shape[cut.dim] == cut.size > 1:
        return tensor
    return tensor.index_select(cut.dim, torch.tensor(cut.keep, device=tensor.device))


def _cut_blocks(tensor: Tensor, cut: BlockCut) -> Tensor:
    if tensor.ndim < 2 or tensor.shape[0] != cut.shape[0]:
        return tensor
    by_column = tensor.shape[1] == cut.shape[1]
    return torch.cat([tensor[list(block.rows)][:, list(block.columns) if by_column else [0]] for block in cut.blocks])


def _cuts(module: str, target: str, plan: Plan) -> list[Cut | BlockCut | ActivationCut]:
    found: list[Cut | BlockCut | ActivationCut] = []
    for surgery in plan.surgeries:
        found += [c for c in surgery.block_cuts if c.tensor == f"{module}.{target}"]
        found += [c for c in surgery.cuts if c.tensor == f"{module}.{target}"]
        found += [c for c in surgery.activations if (c.module, c.target) == (module, target)]
    return found
