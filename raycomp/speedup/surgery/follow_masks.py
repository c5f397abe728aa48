"""Masks that follow the surgery: on into the cut model's coordinates, and back into those of the model before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raycomp.core.masks import Masks
from raycomp.core.target import TargetId, target_kind
from raycomp.speedup.graph.value_masks import (
    full_name,
    masked_copy,
    new_value_masks,
    settle_value_masks,
    value_masks,
)
from raycomp.speedup.surgery.apply import cut_tensor
from raycomp.speedup.surgery.plan import ActivationCut, BlockCut, Cut, Plan, Surgery


def with_value_masks(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> tuple[nn.Module, Plan]:
    """A copy of a model that isn't cut, with its masks on it for good.

    Masked parameters become what they were under their masks in training (zeros, where these multiply), masks of
    inputs and outputs stay as `ModelSpeedup` leaves them; what training bypassed is left alone.

    Args:
        model: a model without compressors on it.
        masks: masks by module and target, 1 = keep.

    Returns:
        The copy, and the plan that repeats this: `apply_plan` and `load_state_dict` on a fresh instance.

    Raises:
        SpeedupError: masks don't fit the model.
    """
    masked = masked_copy(model, Masks.canonical(masks))
    stay = settle_value_masks(masked, new_value_masks(masked, model), value_masks(model))
    return masked, Plan((Surgery(value_masks=stay),) if stay else ())


def remaining_masks(masks: Mapping[str, Mapping[str, Tensor]], plan: Plan) -> Masks:
    """What is still masked in a model that a plan has cut, in its coordinates, each mask with its method.

    Masks of inputs and outputs that were applied are left out: the plan's model holds what is left of them itself. So
    are masks that keep everything.

    Args:
        masks: of the model before.
        plan: what `ModelSpeedup` or `with_value_masks` did with these masks.

    Raises:
        SpeedupError: a mask has another shape than the plan expects.
    """
    given, remaining = Masks.canonical(masks), Masks()
    held = {TargetId(each.module, each.target) for surgery in plan.surgeries for each in surgery.value_masks}
    for target_id, mask in given.by_target():
        method = given.method(*target_id)
        settled = target_kind(target_id.target) != "parameter" and method != "bypass" and plan.surgeries
        if settled or target_id in held:
            continue
        for surgery in plan.surgeries:
            mask = _cut_mask(mask, target_id, surgery)
        if bool((mask == 0).any()):
            remaining.put(target_id, mask, method)
    return remaining


def _cut_mask(mask: Tensor, target_id: TargetId, surgery: Surgery) -> Tensor:
    if target_kind(target_id.target) == "parameter":
        return cut_tensor(mask, full_name(*target_id), surgery)
    for cut in surgery.activations:
        if TargetId(cut.module, cut.target) == target_id and _has(mask, cut):
            mask = mask.index_select(cut.dim, torch.tensor(cut.keep, device=mask.device))
    return mask


def _has(mask: Tensor, cut: ActivationCut) -> bool:
    """Whether a mask holds the coordinates that are cut; it may be of size 1 there, and broadcast."""
    return cut.dim < mask.ndim and mask.shape[cut.dim] == cut.size


def restored_mask(mask: Tensor, name: str, plan: Plan) -> Tensor:
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
