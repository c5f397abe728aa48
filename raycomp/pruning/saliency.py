"""Saliency per block of a tensor: higher means keep. Pure tensor functions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from raycomp.config.entries import Granularity
from raycomp.core.layout import Layout


def block_sizes(granularity: Granularity, layout: Layout) -> tuple[int, ...]:
    """The block's size in each dimension of a target; the whole dimension for -1.

    Args:
        granularity: a name, a list of sizes (padded in front with 1), or (sizes, "front" | "back", padding value).
        layout: the target's shape, and where its channels are.

    Raises:
        ValueError: the shape isn't known, more sizes than dimensions, or a size that doesn't divide its dimension.
    """
    shape = layout.shape
    if shape is None:
        raise ValueError("its shape isn't known without an example input")
    sizes = _named(granularity, layout, shape) if isinstance(granularity, str) else _padded(granularity, shape)
    whole = tuple(dim if size == -1 else size for size, dim in zip(sizes, shape, strict=True))
    if any(dim % size for size, dim in zip(whole, shape, strict=True)):
        raise ValueError(f"blocks of {whole} don't divide the target's shape {shape}")
    return whole


def _named(granularity: str, layout: Layout, shape: Sequence[int]) -> list[int]:
    """One block per channel; a one-dimensional target has only channels."""
    if len(shape) < 2:
        return [1] * len(shape)
    output = layout.channel_dim or 0
    of_inputs = layout.is_parameter and granularity != "out_channel"
    sizes = [-1] * len(shape)
    sizes[_input_dim(output) if of_inputs else output] = 1
    if layout.groups > 1 and not of_inputs:
        sizes[0] = shape[0] // layout.groups
    return sizes


def _input_dim(output: int) -> int:
    return 0 if output == 1 else 1


def _padded(granularity: Sequence[Any], shape: Sequence[int]) -> list[int]:
    sizes, side, padding = granularity, "front", 1
    if isinstance(granularity[0], tuple | list):
        sizes, side, padding = granularity
    missing = len(shape) - len(sizes)
    if missing < 0:
        raise ValueError(f"{len(sizes)} block sizes for a target of shape {tuple(shape)}")
    more = [padding] * missing
    return [*more, *sizes] if side == "front" else [*sizes, *more]


def block_sum(value: Tensor, blocks: Sequence[int]) -> Tensor:
    """The sum over each block: shape `[dim / block for each dimension]`."""
    split = [part for dim, block in zip(value.shape, blocks, strict=True) for part in (dim // block, block)]
    return value.reshape(split).sum(dim=list(range(1, 2 * value.dim(), 2))) if value.dim() else value


def expand_blocks(grid: Tensor, blocks: Sequence[int]) -> Tensor:
    """The inverse of a block reduction: each entry of `grid` repeated over its block."""
    for dim, block in enumerate(blocks):
        grid = grid.repeat_interleave(block, dim=dim)
    return grid


def block_elements(blocks: Sequence[int]) -> int:
    """How many elements one block has."""
    return prod(blocks)


def l1_norm(weight: Tensor, blocks: Sequence[int]) -> Tensor:
    """The L1 norm of each block (Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710)."""
    return block_sum(weight.detach().abs(), blocks)


def taylor(weight: Tensor, gradient: Tensor, blocks: Sequence[int]) -> Tensor:
    """The first-order Taylor estimate of one step, Σ (w·g)² over each block (Molchanov et al., CVPR 2019).

    Args:
        weight: the parameter (or the activation) at which the gradient was taken.
        gradient: of the loss over the whole global batch.
    """
    return block_sum((weight.detach() * gradient.detach()).square(), blocks)


def follow(source: Tensor, layout: Layout, dims: Sequence[int] | None) -> Tensor:
    """The mask that follows `source`: 1 where the source, summed over its other dimensions, is above 0.

    Args:
        source: a mask.
        layout: of the source's target.
        dims: the dimensions to follow; None for the output channels.

    Returns:
        Of the shape of these dimensions; [output channels] without `dims`.
    """
    if dims is None:
        return (layout.channels(source).sum(dim=1) > 0).to(torch.float32)
    others = [dim for dim in range(source.dim()) if dim not in dims]
    summed = source.sum(dim=others) if others else source
    return (summed > 0).to(torch.float32)
