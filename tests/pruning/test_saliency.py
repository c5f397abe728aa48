"""Blocks of a tensor, their saliencies, and masks that follow others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raycomp.core.layout import Layout
from raycomp.pruning.saliency import block_sizes, block_sum, expand_blocks, follow, l1_norm, taylor


def weight(*shape: int, channel_dim: int = 0, groups: int = 1) -> Layout:
    return Layout(shape, channel_dim, groups)


SQUARE = torch.arange(1.0, 17).view(4, 4)


@pytest.mark.parametrize(
    ("granularity", "shape", "blocks"),
    [
        ("out_channel", (8, 4, 3, 3), (1, 4, 3, 3)),
        ("in_channel", (8, 4, 3, 3), (8, 1, 3, 3)),
        ("per_channel", (8, 4, 3, 3), (8, 1, 3, 3)),
        ("out_channel", (8,), (1,)),
        ("in_channel", (8,), (1,)),
        ((4,), (8, 8), (1, 4)),
        ((-1, 4), (8, 8), (8, 4)),
        ((2, 4), (6, 8, 8), (1, 2, 4)),
        (((4, -1), "back", 1), (8, 6, 2), (4, 6, 1)),
        (((4,), "back", -1), (8, 6), (4, 6)),
        (((4,), "front", -1), (8, 8), (8, 4)),
        ((1,), (4, 4), (1, 1)),
    ],
)
def test_granularities_give_block_sizes(granularity: Any, shape: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    assert block_sizes(granularity, weight(*shape)) == blocks


def test_blocks_must_divide_and_fit() -> None:
    with pytest.raises(ValueError, match=r"blocks of \(1, 3\) don't divide the target's shape \(8, 8\)"):
        block_sizes((3,), weight(8, 8))
    with pytest.raises(ValueError, match="3 block sizes for a target of shape"):
        block_sizes((1, 1, 1), weight(8, 8))


def test_block_sums_and_back() -> None:
    assert block_sum(SQUARE, (1, 4)).tolist() == [[10], [26], [42], [58]]
    assert block_sum(SQUARE, (4, 1)).tolist() == [[28, 32, 36, 40]]
    assert block_sum(SQUARE, (2, 2)).tolist() == [[14, 22], [46, 54]]
    assert expand_blocks(torch.tensor([[1, 2], [3, 4]]), (1, 2)).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]


def test_the_l1_norm_of_each_block() -> None:
    assert l1_norm(torch.tensor([[1.0, -2], [-3, 4]]), (1, 2)).tolist() == [[3], [7]]


def test_the_taylor_saliency_squares_before_it_sums() -> None:
    weight, gradient = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, -1], [2, 0.5]])
    # (1·1)² + (2·-1)² = 5, (3·2)² + (4·0.5)² = 40
    assert taylor(weight, gradient, (1, 2)).tolist() == [[5], [40]]


def test_a_follower_keeps_what_the_source_keeps_any_of() -> None:
    source = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 1, 0]])
    layout = weight(3, 3)
    assert follow(source, layout, [0]).tolist() == follow(source, layout, None).tolist() == [0, 1, 1]
    assert follow(source, layout, [1]).tolist() == [0, 1, 0]
    assert {follow(source, layout, dims).dtype for dims in (None, [0])} == {torch.float32}
    assert follow(source, weight(3, 3, channel_dim=1), None).tolist() == [0, 1, 0]
    assert follow(source, layout, [0, 1]).tolist() == source.tolist()


def test_the_output_channels_of_a_grouped_transposed_weight_are_spread_over_its_groups() -> None:
    # 4 inputs in 2 groups, 3 outputs in each: channel 3g + j is [:, j] of the group's rows.
    layout = weight(4, 3, 1, channel_dim=1, groups=2)
    assert block_sizes("out_channel", layout) == (2, 1, 1)
    assert block_sizes("in_channel", layout) == (1, 3, 1)
    mask = torch.ones(4, 3, 1)
    mask[0:2, 1] = 0
    mask[2:4, 2] = 0
    mask[2, 0] = 0
    assert follow(mask, layout, None).tolist() == [1, 0, 1, 1, 1, 0]
