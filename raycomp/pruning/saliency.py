"""Saliency per block of a tensor: higher means keep. Pure tensor functions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from raycomp.config.entries import Granularity

_NAMED = {"out_channel": ((1,), "back", -1), "in_channel": ((-1, 1), "back", -1), "per_channel": ((-1, 1), "back", -1)}


def block_sizes(granularity: Granularity, shape: Sequence[int]) -> tuple[int, ...]:
    """The block's size in each dimension of a tensor of `shape`; the whole dimension for -1.

    Args:
        granularity: a name, a list of sizes (padded in front with 1), or (sizes, "front" | "back", padding value).
        shape: the target's shape.

    Raises:
        ValueError: more sizes than dimensions, or a size that doesn't divide its dimension.
    """
    sizes, side, padding = _spelled_out(granularity)
    missing = len(shape) - len(sizes)
    if missing < 0:
        # A one-dimensional target (a bias under out_channel) has only the first size.
        if isinstance(granularity, str) and len(shape) == 1:
            sizes, missing = sizes[-1:], 0
        else:
            raise ValueError(f"{len(sizes)} block sizes for a target of shape {tuple(shape)}")
    padded = (padding,) * missing + tuple(sizes) if side == "front" else tuple(sizes) + (padding,) * missing
    whole = tuple(dim if size == -1 else size for size, dim in zip(padded, shape, strict=True))
    if any(dim % size for size, dim in zip(whole, shape, strict=True)):
        raise ValueError(f"blocks of {whole} don't divide the target's shape {tuple(shape)}")
    return whole


def _spelled_out(granularity: Granularity) -> tuple[Sequence[int], str, int]:
    if isinstance(granularity, str):
        return _NAMED[granularity]
    if isinstance(granularity[0], tuple | list):
        sizes, side, padding = granularity
        return sizes, side, padding  # type: ignore[return-value]
    return granularity, "front", 1  # type: ignore[return-value]


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


def follow(source: Tensor, dims: Sequence[int]) -> Tensor:
    """The mask that follows `source`: 1 where the source, summed over its other dimensions, is above 0."""
    others = [dim for dim in range(source.dim()) if dim not in dims]
    summed = source.sum(dim=others) if others else source
    return (summed > 0).to(torch.float32)
