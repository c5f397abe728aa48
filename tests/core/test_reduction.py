"""Statistics over ranks: one flat all-reduce per dtype and operation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycomp.core.batch_share import BatchShare, current_share, is_idle, use_share
from raycomp.core.chain import Chain
from raycomp.core.model import device_of
from raycomp.core.moments import Moments
from raycomp.core.reduction import (
    Operation,
    Statistic,
    rank,
    reduce_,
    restored_statistics,
    settle_,
    statistics_state,
    sum_over_ranks_,
    world_size,
)
from raycomp.core.target import TargetId
from raycomp.core.watcher import Watcher
from raycomp.core.watching import watch
from raycomp.errors import CompressionError
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
        with use_share(BatchShare(0, 4)):
            assert is_idle()
        assert not is_idle()
        raise KeyError
    assert current_share() is None


FIRST: list[tuple[tuple[int, ...], torch.dtype, Operation, str]] = [
    ((2,), torch.float32, "sum", "one"),
    ((), torch.float32, "max", "two"),
]
OTHERS: dict[str, tuple[list[tuple[tuple[int, ...], torch.dtype, Operation, str]], str]] = {
    "number": (FIRST[:1], r"rank 0 has two: max of torch.float32 \(\), rank 1 has nothing"),
    "more": ([*FIRST, FIRST[0]], r"rank 0 has nothing, rank 1 has one: sum of torch.float32 \(2,\)"),
    "none": ([], r"rank 0 has one: sum .*, rank 1 has nothing"),
    "size": (
        [((3,), *FIRST[0][1:]), FIRST[1]],
        r"rank 0 has one: sum of torch.float32 \(2,\), rank 1 has one: .*\(3,\)",
    ),
    "dtype": ([((2,), torch.float64, "sum", "one"), FIRST[1]], r"rank 1 has one: sum of torch.float64 \(2,\)"),
    "operation": ([((2,), torch.float32, "mean", "one"), FIRST[1]], r"rank 1 has one: mean of torch.float32 \(2,\)"),
    "target": ([((2,), torch.float32, "sum", "other"), FIRST[1]], r"rank 0 has one: .*, rank 1 has other: sum"),
}


def disagreeing_on_a_rank(own: int, world: int, name: str) -> str:
    described = FIRST if own == 0 else OTHERS[name][0]
    values = [Statistic(torch.ones(shape, dtype=dtype), how, of) for shape, dtype, how, of in described]
    try:
        reduce_(values)
    except CompressionError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", OTHERS)
def test_ranks_that_gathered_different_things_are_told_which(name: str) -> None:
    first, second = on_ranks(2, disagreeing_on_a_rank, name)
    assert first == second
    assert re.search(OTHERS[name][1], first)
    assert "let every worker run the same modules" in first


def means_on_a_rank(own: int, world: int) -> list[list[float]]:
    mean = Statistic(torch.tensor([2.0, 6.0]) * (own + 1), "mean")
    total = Statistic(torch.tensor([1.0 + own]), "sum")
    same = Statistic(torch.tensor([1 / 3]), "mean")
    reduce_([mean, total, same])
    alone = torch.tensor([1.0 + own])
    sum_over_ranks_(alone)
    return [mean.tensor.tolist(), total.tensor.tolist(), same.tensor.tolist(), alone.tolist()]


def test_the_mean_of_what_each_rank_holds() -> None:
    third = torch.tensor([1 / 3]).tolist()
    assert on_ranks(2, means_on_a_rank) == [[[3.0, 9.0], [3.0], third, [3.0]]] * 2


def values_on(own: int) -> dict[str, Statistic]:
    return {
        "sum": Statistic(torch.tensor([1.0, 10.0]) * (own + 1), "sum", "a"),
        "min": Statistic(torch.tensor(5.0 - own), "min", "b"),
        "max": Statistic(torch.tensor(5.0 + own), "max", "c"),
        "mean": Statistic(torch.tensor(2.0 * own, dtype=torch.float64), "mean", "d"),
    }


def settled_on_a_rank(own: int, world: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    gathered = values_on(own)
    settle_(gathered.values())
    here = {key: item.tensor.tolist() for key, item in gathered.items()}
    state = statistics_state(gathered)
    # Rank 0's state is what a checkpoint holds.
    box = [state]
    dist.broadcast_object_list(box, src=0)
    gathered = restored_statistics(box[0], torch.device("cpu"))
    restored = {key: item.tensor.tolist() for key, item in gathered.items()}
    reduce_(gathered.values())
    return here, restored, {key: item.tensor.tolist() for key, item in gathered.items()}


def test_settling_counts_nothing_twice() -> None:
    whole = {"sum": [3.0, 30.0], "min": 4.0, "max": 6.0, "mean": 1.0}
    elsewhere = {**whole, "sum": [0.0, 0.0]}
    assert on_ranks(2, settled_on_a_rank) == [(whole, whole, whole), (elsewhere, elsewhere, whole)]


def restored_on_a_rank(own: int, world: int, state: Any) -> dict[str, Any]:
    gathered = restored_statistics(state, torch.device("cpu"))
    reduce_(gathered.values())
    return {key: (item.tensor.tolist(), item.operation, item.name) for key, item in gathered.items()}


def state_of_two(own: int, world: int) -> Any:
    gathered = values_on(own)
    settle_(gathered.values())
    return statistics_state(gathered)


def test_what_was_settled_goes_on_on_another_number_of_ranks() -> None:
    state = on_ranks(2, state_of_two)[0]
    expected = {
        "sum": ([3.0, 30.0], "sum", "a"),
        "min": (4.0, "min", "b"),
        "max": (6.0, "max", "c"),
        "mean": (1.0, "mean", "d"),
    }
    assert restored_on_a_rank(0, 1, state) == expected
    assert on_ranks(3, restored_on_a_rank, state) == [expected] * 3
    # What goes on leaves the state as it is, so that one can go on from it again.
    for item in restored_statistics(state, torch.device("cpu")).values():
        item.tensor.add_(1)
    assert restored_on_a_rank(0, 1, state) == expected


class Total(Watcher):
    """The sum of all values."""

    def fresh(self, value: Tensor) -> dict[str, Statistic]:
        return {"total": Statistic(torch.zeros((), dtype=value.dtype), "sum", f"total of {self.name}")}

    def update(self, value: Tensor) -> None:
        self.gathered["total"].tensor.add_(value.sum())


class Summing(Moments):
    """A member that watches a target's sum."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.watcher = chain, Total("0._input_0")
        chain.register(self)

    def attach(self) -> None:
        self.chain.space.target(TargetId("0", "_input_0")).add("watchers", self.watcher)

    def running_statistics(self) -> list[Statistic]:
        return self.watcher.statistics()

    def state_dict(self) -> dict[str, Any]:
        return {"gathered": self.watcher.gathered_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watcher.load_gathered(state["gathered"], device_of(self.chain.model))


def summed_on_a_rank(own: int, world: int, saved: Any, values: list[float]) -> tuple[Any, float]:
    """Sums up `values[own]`, after what was saved; gives the state that a checkpoint would hold, and the whole sum."""
    chain = Chain(nn.Sequential(nn.Linear(1, 1)))
    member = Summing(chain)
    if saved is not None:
        chain.load_state_dict(saved)
    with watch("training"):
        chain.model(torch.tensor([[values[own]]]))
    chain.settle()
    box = [chain.state_dict()]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    # Settled again, nothing is counted twice, and more can be counted in.
    with watch("training"):
        chain.model(torch.tensor([[0.5]]))
    chain.settle()
    reduce_(member.watcher.statistics())
    return box[0], float(member.watcher.gathered["total"].tensor)


def test_a_sum_over_ranks_survives_a_checkpoint_on_any_number_of_ranks() -> None:
    (state, first), (_, second) = on_ranks(2, summed_on_a_rank, None, [1.0, 10.0])
    assert first == second == 11 + 2 * 0.5
    (state, first), (_, second) = on_ranks(2, summed_on_a_rank, state, [100.0, 1000.0])
    assert first == second == 1111 + 2 * 0.5
    state, alone = summed_on_a_rank(0, 1, state, [10_000.0])
    assert alone == 11_111 + 0.5
    found = on_ranks(3, summed_on_a_rank, state, [1e5, 0.0, 0.0])
    assert {total for _, total in found} == {111_111 + 3 * 0.5}
