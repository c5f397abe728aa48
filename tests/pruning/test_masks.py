"""From saliencies to masks: the modes, the clamps in each of them, ties, and masks that never grow back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raycomp.config import PruneTarget
from raycomp.pruning.masks import MaskRequest, make_masks


def request(key: str, saliency: list[Any], elements: int = 1, **settings: Any) -> MaskRequest:
    return MaskRequest(key, torch.tensor(saliency, dtype=torch.float32), elements, PruneTarget(**settings))


def kept(*requests: MaskRequest) -> list[list[int]]:
    return [mask.int().tolist() for mask in make_masks(requests).masks.values()]


@pytest.mark.parametrize(
    ("count", "ratio", "pruned"), [(4, 0.6, 2), (4, 0.5, 2), (16, 0.75, 12), (3, 0.3, 0), (100, 0.29, 29), (10, 0.2, 2)]
)
def test_a_ratio_prunes_the_floor_of_its_share(count: int, ratio: float, pruned: int) -> None:
    (mask,) = kept(request("a", list(range(count)), sparse_ratio=ratio))
    assert mask == [0] * pruned + [1] * (count - pruned)


def test_ties_go_by_index() -> None:
    assert kept(request("a", [1, 1, 1, 1, 0], sparse_ratio=0.6)) == [[0, 0, 1, 1, 0]]


def test_a_threshold_keeps_what_reaches_it() -> None:
    assert kept(request("a", list(range(1, 17)), sparse_threshold=6)) == [[0] * 5 + [1] * 11]


@pytest.mark.parametrize(
    ("settings", "pruned"),
    [
        ({"sparse_threshold": 6, "max_sparse_ratio": 0.2}, 3),
        ({"sparse_threshold": 6, "min_sparse_ratio": 0.5}, 8),
        ({"sparse_threshold": 100}, 15),
        ({"sparse_threshold": 100, "max_sparse_ratio": 1.0}, 16),
        ({"sparse_ratio": 0.5, "max_sparse_ratio": 0.25}, 4),
        ({"sparse_ratio": 0.25, "min_sparse_ratio": 0.5}, 8),
        ({"sparse_ratio": 0.5, "max_sparse_ratio": 0.25, "global_group_id": "g"}, 4),
        ({"sparse_ratio": 0.25, "min_sparse_ratio": 0.5, "global_group_id": "g"}, 8),
        ({"sparse_ratio": 0.5, "max_sparse_ratio": 0.25, "dependency_group_id": "d"}, 4),
        ({"sparse_ratio": 0.25, "min_sparse_ratio": 0.5, "dependency_group_id": "d"}, 8),
    ],
)
def test_the_clamps_hold_in_every_mode(settings: dict[str, Any], pruned: int) -> None:
    assert kept(request("a", list(range(1, 17)), **settings)) == [[0] * pruned + [1] * (16 - pruned)]


def test_one_global_group_is_ranked_together() -> None:
    group = {"sparse_ratio": 0.5, "global_group_id": "g"}
    assert kept(request("a", [2, 4, 6, 8], **group), request("b", [80, 6, 4, 2], **group)) == [
        [0, 0, 1, 1],
        [1, 1, 0, 0],
    ]


def test_a_global_group_weighs_blocks_by_their_size() -> None:
    group = {"sparse_ratio": 0.5, "global_group_id": "g"}
    # 4 blocks of 3 and 4 of 1: half of 16 elements is 8. In order: a0 (3), b0 (1), a1 (3), b1 (1), a2 is too much.
    masks = kept(request("a", [1, 3, 5, 7], 3, **group), request("b", [2, 4, 6, 8], 1, **group))
    assert masks == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_global_group_never_takes_a_layer_beyond_its_clamp() -> None:
    group = {"sparse_ratio": 0.5, "global_group_id": "g"}
    # Without the clamp all of a would go.
    masks = kept(request("a", [1, 2, 3, 4], max_sparse_ratio=0.5, **group), request("b", [5, 6, 7, 8], **group))
    assert masks == [[0, 0, 1, 1], [0, 0, 1, 1]]
    masks = kept(request("a", [1, 2, 3, 4], **group), request("b", [5, 6, 7, 8], min_sparse_ratio=0.25, **group))
    assert masks == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_ties_in_a_global_group_go_by_config_order_then_index() -> None:
    group = {"sparse_ratio": 0.5, "global_group_id": "g"}
    assert kept(request("b", [1, 1, 2], **group), request("a", [1, 1, 2], **group)) == [[0, 0, 1], [0, 1, 1]]


def test_unequal_ratios_in_a_global_group_are_refused() -> None:
    requests = [
        request("a", [1, 2], sparse_ratio=0.5, global_group_id="g"),
        request("b", [1, 2], sparse_ratio=0.25, global_group_id="g"),
    ]
    with pytest.raises(ValueError, match=r"global group 'g' need one equal sparse_ratio, not \['0.25', '0.5'\]"):
        make_masks(requests)


def test_a_dependency_group_shares_the_mask_of_its_mean() -> None:
    group = {"sparse_ratio": 0.5, "dependency_group_id": "d"}
    # Means 5, 2, 5.5, 4.
    assert kept(request("a", [1, 2, 3, 4], **group), request("b", [9, 2, 8, 4], **group)) == [[1, 0, 1, 0]] * 2


def test_a_dependency_group_with_internal_blocks_prunes_as_many_in_each() -> None:
    group = {"sparse_ratio": 0.5, "dependency_group_id": "d"}
    saliency = [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept(request("a", saliency, internal_metric_block=2, **group)) == [[0, 0, 1, 1, 0, 0, 1, 1]]
    # The least common multiple of 2 and 4 is 4: one of each pair.
    members = [request(key, saliency, internal_metric_block=blocks, **group) for key, blocks in (("a", 2), ("b", 4))]
    assert kept(*members) == [[0, 1] * 4] * 2


def test_internal_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="internal_metric_block 3 doesn't divide the 4 blocks of a"):
        make_masks([request("a", [1, 2, 3, 4], sparse_ratio=0.5, dependency_group_id="d", internal_metric_block=3)])


def test_members_of_a_dependency_group_need_equal_shapes_and_ratios() -> None:
    with pytest.raises(ValueError, match="a and b share a dependency group, but have"):
        make_masks(
            [request(key, [1] * n, sparse_ratio=0.5, dependency_group_id="d") for key, n in (("a", 2), ("b", 3))]
        )
    with pytest.raises(ValueError, match="differ in sparse_ratio"):
        make_masks(
            [request(key, [1, 2], sparse_ratio=r, dependency_group_id="d") for key, r in (("a", 0.5), ("b", 0.4))]
        )


def test_a_convolutions_channels_can_go_with_a_linear_layers() -> None:
    group = {"sparse_ratio": 0.5, "dependency_group_id": "d"}
    masks = make_masks([request("conv", [[[[1]]], [[[5]]]], **group), request("fc", [[1], [5]], **group)]).masks
    assert [tuple(mask.shape) for mask in masks.values()] == [(2, 1, 1, 1), (2, 1)]
    assert [mask.flatten().tolist() for mask in masks.values()] == [[False, True]] * 2


def test_a_dependency_group_stands_in_a_global_group_as_one() -> None:
    both = {"sparse_ratio": 0.5, "global_group_id": "g", "dependency_group_id": "d"}
    alone = {"sparse_ratio": 0.5, "global_group_id": "g"}
    # 6 elements: the pair's steps weigh 2, so 3 elements are one pair (1.5) and one of c (2).
    masks = kept(request("a", [1, 9], **both), request("b", [2, 9], **both), request("c", [2, 3], **alone))
    assert masks == [[0, 1], [0, 1], [0, 1]]


def schedule(fraction: float, saliency: list[float], pruned: Tensor | None, **settings: Any) -> Tensor:
    item = MaskRequest("a", torch.tensor(saliency), 1, PruneTarget(**settings), fraction, pruned)
    return make_masks([item]).masks["a"]


@pytest.mark.parametrize(
    "settings", [{"sparse_ratio": 0.5}, {"sparse_threshold": 8.0}, {"sparse_ratio": 0.5, "global_group_id": "g"}]
)
def test_what_is_pruned_stays_pruned(settings: dict[str, Any]) -> None:
    first = schedule(0.5, [1.0, 9.0, 9.0, 9.0], None, **settings)
    assert first.tolist() == [False, True, True, True]
    # The first has the greatest saliency now.
    second = schedule(1.0, [99.0, 3.0, 9.0, 9.0], ~first, **settings)
    assert second.tolist() == [False, False, True, True]


def test_what_a_global_group_pruned_stays_though_a_clamp_takes_the_budget() -> None:
    shared = {"sparse_ratio": 0.5, "global_group_id": "g"}
    pruned = torch.tensor([True, True, True, False])
    requests = [
        MaskRequest("a", torch.ones(4), 1, PruneTarget(**shared), 1.0, pruned),
        MaskRequest("b", torch.arange(4.0), 1, PruneTarget(min_sparse_ratio=0.75, **shared), 1.0, None),
    ]
    assert [mask.int().tolist() for mask in make_masks(requests).masks.values()] == [[0, 0, 0, 1], [0, 0, 0, 1]]


WHOLE = "b: all of it would be masked, so a block stays (unless max_sparse_ratio: 1)"


def test_a_global_group_leaves_every_target_a_block_and_says_so() -> None:
    group = {"sparse_ratio": 0.5, "global_group_id": "g"}
    masks, notes = make_masks([request("a", [5, 6, 7, 8], **group), request("b", [1, 2], **group)])
    assert [mask.int().tolist() for mask in masks.values()] == [[0, 0, 1, 1], [0, 1]]
    assert notes == (WHOLE,)
    masks, notes = make_masks([request("a", [5, 6, 7, 8], **group), request("b", [1, 2], max_sparse_ratio=1, **group)])
    assert [mask.int().tolist() for mask in masks.values()] == [[0, 1, 1, 1], [0, 0]]
    assert notes == ()


def test_a_target_whose_goal_leaves_one_block_is_none_of_these() -> None:
    group = {"sparse_ratio": 0.5, "global_group_id": "g"}
    _, notes = make_masks([request("a", [5, 6], **group), request("b", [1, 9], **group)])
    assert notes == ()


def test_a_threshold_above_all_leaves_a_block_and_says_so() -> None:
    masks, notes = make_masks([request("b", [1, 2, 3], sparse_threshold=9)])
    assert (masks["b"].int().tolist(), notes) == ([0, 0, 1], (WHOLE,))
    masks, notes = make_masks([request("b", [1, 2, 3], sparse_threshold=9, max_sparse_ratio=1)])
    assert (masks["b"].int().tolist(), notes) == ([0, 0, 0], ())


CONSTANT = "a: all saliencies are the same, so nothing of it is masked"


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_blocks_of_one_saliency_are_not_pruned_by_their_index(value: float) -> None:
    masks, notes = make_masks([request("a", [value] * 4, sparse_ratio=0.5), request("b", [1, 2], sparse_ratio=0.5)])
    assert [mask.int().tolist() for mask in masks.values()] == [[1, 1, 1, 1], [0, 1]]
    assert notes == (CONSTANT,)


def test_a_constant_target_is_as_if_outside_of_its_global_group() -> None:
    group = {"sparse_ratio": 0.5, "global_group_id": "g"}
    masks, notes = make_masks([request("a", [0] * 4, **group), request("c", [1, 2, 3, 4], **group)])
    assert [mask.int().tolist() for mask in masks.values()] == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert notes == (CONSTANT,)


def test_a_threshold_says_of_equal_saliencies_what_goes() -> None:
    masks, notes = make_masks([request("a", [1, 1, 1], sparse_threshold=0.5)])
    assert (masks["a"].all(), notes) == (True, ())


def test_what_is_left_of_a_target_may_be_constant_once_the_goal_is_reached() -> None:
    gone = torch.tensor([True, True, False, False])
    masks, notes = make_masks([MaskRequest("a", torch.ones(4), 1, PruneTarget(sparse_ratio=0.5), 1.0, gone)])
    assert (masks["a"].int().tolist(), notes) == ([0, 0, 1, 1], ())


def test_saliencies_that_differ_by_rounding_are_the_same() -> None:
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    saliency = torch.stack([row[torch.randperm(64)].abs().sum() for _ in range(8)])
    masks, notes = make_masks([MaskRequest("a", saliency, 1, PruneTarget(sparse_ratio=0.5))])
    assert (bool(masks["a"].all()), notes) == (True, (CONSTANT,))
