"""Masks that follow other masks: which target follows which, in which order, and what of it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from raycomp.config import Align, PruneTarget
from raycomp.core.layout import Layout
from raycomp.core.selection import Selected
from raycomp.core.target import TargetId, target_kind
from raycomp.errors import Problem
from raycomp.pruning.saliency import follow


@dataclass(frozen=True)
class Follower:
    """A target whose mask follows another's.

    Args:
        target_id: the target that follows.
        source: the target that it follows.
        dims: the source's dimensions; None for its output channels.
    """

    target_id: TargetId
    source: TargetId
    dims: tuple[int, ...] | None


def followers(selected: Mapping[TargetId, Selected]) -> dict[TargetId, Follower]:
    """The targets that follow, by their `align`; a bias without a goal of its own follows its module's weight."""
    found = {}
    for target_id, item in selected.items():
        assert isinstance(item.settings, PruneTarget)
        align = item.settings.align
        if align is None and _follows_its_weight(target_id, item, selected):
            align = Align()
        if align is not None:
            module = target_id.module if align.module_name is None else align.module_name
            dims = align.dims if align.dims is None else tuple(align.dims)
            found[target_id] = Follower(target_id, TargetId(module, align.target_name), dims)
    return found


def _follows_its_weight(target_id: TargetId, item: Selected, selected: Mapping[TargetId, Selected]) -> bool:
    own = {"sparse_ratio", "sparse_threshold", "budget"} & item.own_keys
    return target_id.target == "bias" and TargetId(target_id.module, "weight") in selected and not own


def in_order(waiting: Sequence[Follower]) -> list[Follower]:
    """The followers, each after what it follows; those in a circle are left out."""
    order: list[Follower] = []
    left = list(waiting)
    while left:
        unmade = {each.target_id for each in left}
        ready = [each for each in left if each.source not in unmade]
        if not ready:
            break
        order += ready
        left = [each for each in left if each not in ready]
    return order


def alignment_problems(
    selected: Mapping[TargetId, Selected],
    following: Mapping[TargetId, Follower],
    masked: Sequence[TargetId],
    layouts: Mapping[TargetId, Layout],
) -> Iterator[Problem]:
    """What is wrong with the followers.

    Args:
        selected: the pruner's targets.
        following: those that follow.
        masked: targets that this pruner or one before it masks.
        layouts: of the followers and of what they follow.
    """
    ordered = in_order(list(following.values()))
    for target_id, follower in following.items():
        where = f"{selected[target_id].where}.align"
        if follower.source not in masked:
            remedy = "name a target that this pruner or one fused before it masks"
            yield Problem(where, f"{target_id} follows {follower.source}, which has no mask", remedy)
        elif follower not in ordered:
            yield Problem(where, f"{target_id} follows itself in a circle")
        else:
            yield from _shape_problems(follower, layouts[target_id], layouts[follower.source], where)


def _shape_problems(follower: Follower, ours: Layout, theirs: Layout, where: str) -> Iterator[Problem]:
    if theirs.shape is None or target_kind(follower.source.target) != "parameter":
        return
    dims = follower.dims
    if dims is not None and any(dim >= len(theirs.shape) for dim in dims):
        yield Problem(where, f"dims {list(dims)} are not dimensions of {follower.source}, of shape {theirs.shape}")
        return
    count = theirs.output_channels if dims is None else prod(theirs.shape[dim] for dim in dims)
    if target_kind(follower.target_id.target) == "parameter":
        if ours.shape is not None and count != prod(ours.shape):
            message = f"{follower.target_id} of shape {ours.shape} can't follow {count} entries of {follower.source}"
            yield Problem(where, message)
    elif ours.is_ambiguous:
        message = f"which dimension of {follower.target_id}, of shape {ours.shape}, holds {count} channels isn't clear"
        yield Problem(where, message, "give an example input whose dimensions differ in size")
    elif ours.shape is not None and count not in ours.shape:
        message = f"{follower.target_id} of shape {ours.shape} has no dimension of {count} channels"
        yield Problem(where, f"{message} to follow {follower.source}")


def followed_mask(follower: Follower, mask: Tensor, ours: Layout, theirs: Layout) -> Tensor:
    """The follower's mask, made from its source's, in the follower's shape.

    Channels of an input or output lie where the module's class says; else where the example has as many, if that is
    one dimension alone; else where the class of the module that it follows says.
    """
    kept = follow(mask, theirs, follower.dims)
    if target_kind(follower.target_id.target) == "parameter":
        assert ours.shape is not None
        return kept.reshape(ours.shape)
    dim = channel_dim(kept.numel(), ours, theirs, follower.source)
    if ours.rank is None:
        return kept.flatten() if dim == -1 else kept.reshape(1, -1)
    shape = [1] * ours.rank
    shape[dim] = kept.numel()
    return kept.reshape(shape)


def channel_dim(count: int, ours: Layout, theirs: Layout, source: TargetId) -> int:
    """The dimension of an input or output in which `count` channels that follow a source lie."""
    if ours.channel_dim is not None:
        return ours.channel_dim
    if ours.shape is not None:
        fitting = [dim for dim, size in enumerate(ours.shape) if dim and size == count]
        if len(fitting) == 1:
            return fitting[0]
    return theirs.value_channel_dim if theirs.value_channel_dim is not None else 1
