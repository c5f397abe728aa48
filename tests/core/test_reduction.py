"""Statistics over ranks: one flat all-reduce per dtype and operation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from raycomp.core.batch_share import BatchShare, current_share, is_idle, use_share
from raycomp.core.reduction import Statistic, rank, reduce_, world_size
from tests.pipeline.ranks import on_ranks


def merged_on_a_rank(own: int, world: int) -> tuple[list[list[float]], int]:
    calls = 0
    whole = dist.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return whole(*args, **kwargs)

    dist.all_reduce = counted
    tensors = [
        torch.tensor([1.0, 2.0]) * (own + 1),
        torch.tensor(float(own)),
        torch.tensor([[5.0], [float("inf")]]) - own,
        torch.tensor([1.0 + own], dtype=torch.float64),
        torch.tensor([10.0 * own]),
    ]
    operations = ("sum", "max", "min", "sum", "sum")
    try:
        reduce_([Statistic(tensor, operation) for tensor, operation in zip(tensors, operations, strict=True)])
    finally:
        dist.all_reduce = whole
    assert (rank(), world_size()) == (own, world)
    return [tensor.flatten().tolist() for tensor in tensors], calls


def test_every_rank_holds_the_merged_values_of_four_all_reduces() -> None:
    # What is reduced, sums in float32, minima with maxima in float32, sums in float64.
    expected = [[3.0, 6.0], [1.0], [4.0, float("inf")], [3.0], [10.0]]
    assert on_ranks(2, merged_on_a_rank) == [(expected, 4)] * 2


def test_alone_nothing_changes() -> None:
    value = torch.tensor([1.0, 2.0])
    reduce_([Statistic(value, "sum")])
    assert value.tolist() == [1, 2]
    assert (rank(), world_size()) == (0, 1)


def test_a_share_holds_within_its_block() -> None:
    assert current_share() is None and not is_idle()
    with use_share(BatchShare(1, 4)) as _, pytest.raises(KeyError):
        assert current_share() == BatchShare(1, 4)
        assert BatchShare(1, 4).weight == 0.25
        with use_share(BatchShare(0, 4)):
            assert is_idle()
        assert not is_idle()
        raise KeyError
    assert current_share() is None
