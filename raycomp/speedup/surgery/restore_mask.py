"""Masks of a cut model, back in the coordinates of the model before the cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomp.speedup.surgery.plan import BlockCut, Cut, Plan


def uncut_mask(mask: Tensor, name: str, plan: Plan) -> Tensor:
    """A mask of a model that `plan` has cut, as a mask of the model before: what was cut away counts as masked.

    Args:
        mask: of the cut tensor's shape.
        name: the tensor's full name, `module.target`.
        plan: the surgery that lies between.
    """
    for surgery in reversed(plan.surgeries):
        for block_cut in reversed(surgery.block_cuts):
            if block_cut.tensor == name:
                mask = _spread_blocks(mask, block_cut)
        for cut in reversed(surgery.cuts):
            if cut.tensor == name:
                mask = _spread(mask, cut)
    return mask


def _spread(mask: Tensor, cut: Cut) -> Tensor:
    shape = [cut.size if dim == cut.dim else size for dim, size in enumerate(mask.shape)]
    return mask.new_zeros(shape).index_copy(cut.dim, torch.tensor(cut.keep, device=mask.device), mask)


def _spread_blocks(mask: Tensor, cut: BlockCut) -> Tensor:
    full, offset = mask.new_zeros((*cut.shape, *mask.shape[2:])), 0
    for block in cut.blocks:
        rows = mask[offset : offset + len(block.rows)]
        full[torch.tensor(block.rows)[:, None], torch.tensor(block.columns)] = rows
        offset += len(block.rows)
    return full
