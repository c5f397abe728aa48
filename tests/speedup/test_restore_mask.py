"""Masks of a cut model in the coordinates of the model before."""

from __future__ import annotations

import torch

from raycomp.speedup import Plan, uncut_mask
from raycomp.speedup.surgery.plan import Block, BlockCut, Cut, Surgery


def test_what_was_cut_counts_as_masked() -> None:
    plan = Plan(
        (
            Surgery(cuts=(Cut("a.weight", 0, 4, (0, 2, 3)), Cut("a.weight", 1, 2, (1,)))),
            Surgery(cuts=(Cut("a.weight", 0, 3, (0, 2)), Cut("b.weight", 0, 9, (1,)))),
        )
    )
    mask = uncut_mask(torch.tensor([[0.0], [1.0]]), "a.weight", plan)
    assert mask.tolist() == [[0, 0], [0, 0], [0, 0], [0, 1]]


def test_a_grouped_weight_is_spread_group_by_group() -> None:
    blocks = (Block((0,), (1,)), Block((2,), (0,)))
    plan = Plan((Surgery(block_cuts=(BlockCut("a.weight", (4, 2), blocks),)),))
    assert uncut_mask(torch.ones(2, 1), "a.weight", plan).tolist() == [[0, 1], [0, 0], [1, 0], [0, 0]]


def test_a_mask_of_another_tensor_stays() -> None:
    plan = Plan((Surgery(cuts=(Cut("a.weight", 0, 4, (0,)),)),))
    assert uncut_mask(torch.ones(3), "b.weight", plan).tolist() == [1, 1, 1]
