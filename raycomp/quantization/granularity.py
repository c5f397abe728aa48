"""Where the scales of a target lie: which channels have one each, and in which dimension these are."""

from __future__ import annotations

from typing import Any

from raycomp.core.layout import Layout
from raycomp.core.target import TargetId, target_kind

_OUTPUT_CHANNELS = ("out_channel", "per_channel")


def granularity_problem(
    granularity: Any, target_id: TargetId, layout: Layout, groups: int = 1
) -> tuple[str, str] | None:
    """Message and remedy for a granularity that names no channels of the target; None where it names some.

    Args:
        granularity: as the config list says.
        target_id: the target.
        layout: the target's.
        groups: of the module, where it is a convolution.
    """
    if granularity == "default":
        return None
    if not isinstance(granularity, str):
        return f"{granularity} is not a granularity of scales", "out_channel, in_channel, per_channel or default"
    kind = target_kind(target_id.target)
    if kind == "parameter":
        if granularity not in _OUTPUT_CHANNELS and (groups > 1 or len(layout.shape or ()) < 2):
            return f"{target_id} has no input channels of its own", "out_channel, or leave it out: one scale"
        return None
    other = "out_channel" if kind == "input" else "in_channel"
    if granularity == other:
        own = "in_channel" if kind == "input" else "out_channel"
        return f"{target_id} is an {kind}, which has no {other}s", f"{own}, per_channel, or leave it out: one scale"
    if layout.channel_dim is None:
        remedy = "leave it out: one scale; or quantize the input of the layer behind it, whose class tells"
        return f"which dimension of {target_id} holds its channels isn't known from its class", remedy
    return None


def by_group(granularity: Any, layout: Layout) -> bool:
    """Whether the scales belong to the output channels of a grouped transposed convolution: they lie in no one
    dimension, so they have the weight's own first two."""
    return granularity in _OUTPUT_CHANNELS and layout.is_parameter and layout.groups > 1


def scale_layout(granularity: Any, layout: Layout) -> tuple[int | None, tuple[int, ...]]:
    """The dimension whose entries have a scale each (None: there is one scale, or `by_group`), and the scale's shape as
    far as it is known."""
    if granularity == "default":
        return None, ()
    if by_group(granularity, layout):
        assert layout.shape is not None
        return None, (*layout.shape[:2], *[1] * (len(layout.shape) - 2))
    channels = layout.positive_channel_dim or 0
    axis = channels if granularity in _OUTPUT_CHANNELS or not layout.is_parameter else int(channels == 0)
    if layout.shape is None:
        return axis, ()
    return axis, tuple(size if dim == axis % len(layout.shape) else 1 for dim, size in enumerate(layout.shape))
