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
        ValueError: the shape or the dimension of the channels isn't known, more sizes than dimensions, or a size that
            doesn't divide its dimension.
    """
    shape = layout.shape
    if shape is None:
        raise ValueError("its shape isn't known without an example input")
    sizes = _named(granularity, layout, shape) if isinstance(granularity, str) else padded_sizes(granularity, shape)
    if not layout.is_parameter:
        sizes = [-1, *sizes[1:]]  # one mask for all samples
    whole = tuple(dim if size == -1 else size for size, dim in zip(sizes, shape, strict=True))
    if any(dim % size for size, dim in zip(whole, shape, strict=True)):
        raise ValueError(f"blocks of {whole} don't divide the target's shape {shape}")
    return whole


def _named(granularity: str, layout: Layout, shape: Sequence[int]) -> list[int]:
    """One block per channel; a one-dimensional target has only channels."""
    if len(shape) < 2:
        return [1] * len(shape)
    output = layout.channel_dim or 0
    if layout.channel_dim is None and not layout.is_parameter:
        if len(shape) == 3:
            # [n, channels, length], or [n, length, channels].
            raise ValueError(
                "which of its 3 dimensions holds the channels isn't known: give [-1, 1, -1] or [-1, -1, 1]"
            )
        output = 1
    of_inputs = layout.is_parameter and granularity != "out_channel"
    sizes = [-1] * len(shape)
    sizes[_input_dim(output) if of_inputs else output] = 1
    if layout.groups > 1 and not of_inputs:
        sizes[0] = shape[0] // layout.groups
    return sizes


def _input_dim(output: int) -> int:
    return 0 if output == 1 else 1


def padded_sizes(granularity: Sequence[Any], shape: Sequence[int]) -> list[int]:
    """A size for each dimension of `shape`, from a list of sizes (padded in front with 1) or its long form.

    Raises:
        ValueError: more sizes than dimensions.
    """
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
    pairs = list(zip(grid.shape, blocks, strict=True))
    split = grid.reshape([size for count, _ in pairs for size in (count, 1)])
    repeated = split.expand([size for pair in pairs for size in pair])
    return repeated.reshape([count * block for count, block in pairs])


def block_elements(blocks: Sequence[int]) -> int:
    """How many elements one block has."""
    return prod(blocks)


def block_vectors(value: Tensor, blocks: Sequence[int]) -> Tensor:
    """The entries of each block in a row: [blocks, entries of a block]."""
    split = [part for dim, block in zip(value.shape, blocks, strict=True) for part in (dim // block, block)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return value.reshape(split).permute(order).reshape(-1, block_elements(blocks))


def from_block_vectors(vectors: Tensor, shape: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """The value of which `vectors` are the `block_vectors`.

    Args:
        vectors: [blocks, entries of a block].
        shape: of the value.
        blocks: the size of a block in each dimension.
    """
    counts = [dim // block for dim, block in zip(shape, blocks, strict=True)]
    split = vectors.reshape([*counts, *blocks])
    order = [place for dim in range(len(shape)) for place in (dim, dim + len(shape))]
    return split.permute(order).reshape(tuple(shape))


def l1_norm(weight: Tensor, blocks: Sequence[int]) -> Tensor:
    """The L1 norm of each block (Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710)."""
    return block_sum(weight.detach().abs(), blocks)


def l2_norm(weight: Tensor, blocks: Sequence[int]) -> Tensor:
    """The L2 norm of each block."""
    return block_sum(weight.detach().square(), blocks).sqrt()


def distances(vectors: Tensor, at_once: int = 1 << 24) -> Tensor:
    """The sum of each vector's Euclidean distances to all others (He et al., Filter Pruning via Geometric Median,
    arXiv:1811.00250).

    Args:
        vectors: [n, entries].
        at_once: how many distances are in memory at a time.

    Returns:
        [n], in float64: squares of differences are taken from inner products, which need the digits.
    """
    wide = vectors.detach().double()
    # Distances don't change with the origin, and their digits are fewest where all lie far from it.
    wide = wide - wide.mean(dim=0)
    squares = wide.square().sum(dim=1)
    rows = max(at_once // max(len(wide), 1), 1)
    parts = [
        (own.unsqueeze(1) + squares - 2 * (part @ wide.T)).clamp_(min=0).sqrt_().sum(dim=1)
        for part, own in zip(wide.split(rows), squares.split(rows), strict=True)
    ]
    return torch.cat(parts)


def layer_adaptive(squares: Tensor) -> Tensor:
    """A block's squared norm as a part of that of all blocks of its layer that are no smaller (Lee et al.,
    Layer-adaptive Sparsity for the Magnitude-based Pruning, LAMP, arXiv:2010.07611): comparable over layers.

    Args:
        squares: each block's squared norm.
    """
    ascending, order = squares.detach().flatten().sort(stable=True)
    values = ascending.double()
    above = values.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(values)
    return scores.scatter_(0, order, torch.where(above > 0, values / above, 0.0)).view(squares.shape)


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
