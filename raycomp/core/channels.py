"""In which dimension of an input or output the channels of another module lie, found out by an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raycomp.config import PruneTarget
from raycomp.core.layout import Layout, layout_of, observed_values
from raycomp.core.target import TargetId, target_kind


def followed_channels(
    model: nn.Module, settings: Mapping[TargetId, Any], layouts: Mapping[TargetId, Layout], example: Any
) -> dict[TargetId, Layout]:
    """The layouts of inputs and outputs that follow another module's channels, where sizes alone don't tell which
    dimension these lie in.

    The first channel of the followed module's output is changed; the dimension is the one in whose first entry alone
    the follower changes. Where none is, `channel_dim` stays None.

    Args:
        model: the model.
        settings: of each target; those that align to a parameter matter.
        layouts: of the same targets.
        example: an example input.
    """
    found = {}
    for target_id, own in settings.items():
        layout = layouts[target_id]
        align = own.align if isinstance(own, PruneTarget) else None
        if align is None or layout.is_parameter or layout.channel_dim is not None or layout.shape is None:
            continue
        source = TargetId(align.module_name or target_id.module, align.target_name)
        if target_kind(source.target) != "parameter":
            continue
        theirs = layout_of(model, source)
        if len(fitting_dims(layout, theirs, align.dims)) > 1:
            dim = _changed_dim(model, source.module, theirs, target_id, layout, example)
            found[target_id] = replace(layout, channel_dim=dim, is_ambiguous=dim is None)
    return found


def fitting_dims(layout: Layout, source: Layout, dims: tuple[int, ...] | None) -> list[int]:
    """The dimensions behind the batch that are as large as what is followed of the source."""
    assert source.shape is not None
    count = source.output_channels if dims is None else prod(source.shape[dim] for dim in dims)
    return [dim for dim, size in enumerate(layout.shape or ()) if dim and size == count]


def _changed_dim(
    model: nn.Module, source: str, theirs: Layout, target_id: TargetId, layout: Layout, example: Any
) -> int | None:
    dim = theirs.value_channel_dim
    if dim is None:
        return None
    before = observed_values(model, [target_id], example)[target_id]
    changed = torch.zeros_like(before, dtype=torch.bool)
    # Far to both sides: an activation may clip one of them.
    for factor in (-10.0, 10.0):
        hook = model.get_submodule(source).register_forward_hook(partial(_move_first, dim, factor))
        try:
            changed |= before != observed_values(model, [target_id], example)[target_id]
        finally:
            hook.remove()
    alone = [dim for dim in range(1, changed.dim()) if _only_first(changed, dim)]
    return alone[0] if len(alone) == 1 else None


def _move_first(dim: int, factor: float, module: nn.Module, args: Any, output: Any) -> Any:
    def moved(value: Tensor) -> Tensor:
        changed = value.clone()
        changed.select(dim, 0).add_(factor * (1 + value.abs().max()))
        return changed

    return pytree.tree_map_only(Tensor, moved, output)


def _only_first(changed: Tensor, dim: int) -> bool:
    entries = changed.movedim(dim, 0).reshape(changed.shape[dim], -1).any(dim=1)
    return bool(entries[0]) and not bool(torch.any(entries[1:]))
