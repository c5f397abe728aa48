from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from raycomp.core.batch_share import BatchShare, rank_slice, use_share, weighted_loss
from raycomp.core.reduction import rank as own_rank
from raycomp.errors import TaskError
from raycomp.pipeline.data.batches import open_batches
from raycomp.pipeline.data.plan import BatchPlan, LoaderContext, MicroBatch
from raycomp.pipeline.task import Task
from raycomp.pipeline.training.shares import weighted_shares
from tests.pipeline.ranks import gradients_of, on_ranks


class Numbers(Dataset[Tensor]):
    """Sample i is the number i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index))


def tensors(length: int) -> TensorDataset:
    return TensorDataset(torch.arange(length, dtype=torch.float64), 10 * torch.arange(length))


def steps_of(data: Any, epoch: int = 0, task: Task | None = None, **plan: Any) -> list[list[MicroBatch]]:
    return list(open_batches(task or Task(), data, BatchPlan(**plan)).iterate(epoch))


def numbers(step: list[MicroBatch]) -> list[float]:
    """The samples that count in a step."""
    found = [part.batch[0] if isinstance(part.batch, list) else part.batch for part in step if part.share.samples]
    return torch.cat(found).tolist() if found else []


def test_every_number_of_workers_sees_the_same_global_batches() -> None:
    alone = [numbers(step) for step in steps_of(tensors(23), epoch=3, global_batch_size=6, seed=5)]
    assert [len(step) for step in alone] == [6, 6, 6, 5]
    assert sorted(chain.from_iterable(alone)) == list(range(23))
    for world in (2, 3, 4, 8):
        ranks = [
            steps_of(tensors(23), epoch=3, global_batch_size=6, seed=5, rank=rank, world=world) for rank in range(world)
        ]
        assert [list(chain.from_iterable(numbers(rank[k]) for rank in ranks)) for k in range(4)] == alone


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(epoch: int, seed: int) -> list[float]:
        steps = steps_of(tensors(50), epoch=epoch, global_batch_size=10, seed=seed)
        return list(chain.from_iterable(map(numbers, steps)))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(1, 0) != order(0, 1)


def test_shares_tell_samples() -> None:
    # 5 samples in micro-batches of 3 and 2, on 2 ranks: 2 + 1 and 1 + 1.
    steps = [steps_of(tensors(5), global_batch_size=5, accumulation=2, rank=rank, world=2)[0] for rank in range(2)]
    assert [[part.share for part in step] for step in steps] == [
        [BatchShare(2, 3), BatchShare(1, 2)],
        [BatchShare(1, 3), BatchShare(1, 2)],
    ]


def test_a_rank_without_samples_gets_a_stand_in() -> None:
    ranks = [steps_of(tensors(9), global_batch_size=8, rank=rank, world=3) for rank in range(3)]
    last = [rank[1][0] for rank in ranks]
    assert [part.share for part in last] == [BatchShare(1, 1), BatchShare(0, 1), BatchShare(0, 1)]
    assert [len(part.batch[0]) for part in last] == [1, 2, 2]


def test_micro_batches_that_nobody_fills_are_left_out() -> None:
    steps = steps_of(tensors(6), global_batch_size=4, accumulation=4)
    assert [len(step) for step in steps] == [4, 2]
    assert sorted(chain.from_iterable(map(numbers, steps))) == list(range(6))


@pytest.mark.parametrize("total", range(8))
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_slices_cover_all_and_fill_rank_0_first(total: int, world: int) -> None:
    parts = [list(range(total))[rank_slice(total, rank, world)] for rank in range(world)]
    sizes = [len(part) for part in parts]
    assert list(chain.from_iterable(parts)) == list(range(total))
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)


def test_an_epoch_has_as_many_steps_as_it_says() -> None:
    whole = steps_of(tensors(23), epoch=2, global_batch_size=4)
    assert open_batches(Task(), tensors(23), BatchPlan(4)).steps_per_epoch == 6 == len(whole)


class Noisy(Numbers):
    """Draws from every global generator, as datasets with random transforms do."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()])


class Jitter(Task):
    def augment(self, sample: Tensor, generator: Generator) -> Tensor:
        return torch.cat([sample, torch.rand(1, generator=generator)])


@pytest.mark.parametrize("num_data_workers", [0, 2])
def test_randomness_belongs_to_the_sample(num_data_workers: int) -> None:
    def rows(epoch: int, rank: int, world: int, seed: int = 0) -> dict[int, list[float]]:
        steps = steps_of(
            Noisy(11),
            epoch,
            task=Jitter(),
            global_batch_size=4,
            seed=seed,
            rank=rank,
            world=world,
            num_data_workers=num_data_workers,
        )
        found = torch.cat([part.batch for step in steps for part in step if part.share.samples])
        return {int(row[0]): row[1:].tolist() for row in found}

    alone = rows(1, 0, 1)
    assert {**rows(1, 0, 2), **rows(1, 1, 2)} == alone
    assert alone[3] != rows(2, 0, 1)[3]
    assert alone[3] != rows(1, 0, 1, seed=1)[3]
    assert len({value for row in alone.values() for value in row}) == 11 * 4


def test_loading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    expected = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    steps_of(Noisy(6), global_batch_size=2, task=Jitter())
    assert (torch.rand(()), random.random(), np.random.rand()) == expected


def test_tensors_are_indexed_by_batch_with_the_same_result() -> None:
    class OneByOne(Task):
        def collate(self, samples: list[Any]) -> Any:
            return super().collate(samples)

    data = Subset(Subset(tensors(20), range(3, 20)), [5, 1, 9, 2, 16])
    quick, slow = (steps_of(data, global_batch_size=2, task=task) for task in (Task(), OneByOne()))
    for left, right in zip(quick, slow, strict=True):
        for a, b in zip(left[0].batch, right[0].batch, strict=True):
            assert torch.equal(a, b)
    assert sorted(chain.from_iterable(map(numbers, quick))) == [4.0, 5.0, 8.0, 12.0, 19.0]


class Broken(Numbers):
    def __getitem__(self, index: int) -> Tensor:
        if index == 3:
            raise KeyError("no such file")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_data_workers", [0, 1])
def test_a_sample_that_raises_is_one_clear_error(num_data_workers: int) -> None:
    with pytest.raises(TaskError) as raised:
        steps_of(Broken(5), global_batch_size=5, num_data_workers=num_data_workers)
    assert "sample 3 of Task's data raised KeyError: 'no such file'" in str(raised.value)
    assert f"{__file__}:" in str(raised.value.where)
    assert "Traceback" not in str(raised.value)


def test_what_can_not_be_shared_out_is_refused() -> None:
    for data in (DataLoader(tensors(4)), {"x": torch.zeros(3)}, 5):
        with pytest.raises(TaskError, match="can't be split among workers"):
            open_batches(Task(), data, BatchPlan(2))
    with pytest.raises(TaskError, match="train data is empty"):
        open_batches(Task(), tensors(0), BatchPlan(2))


# Training on N ranks: the gradients are those of one process.


def _gradients(rank: int, world: int, length: int, accumulation: int) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(1, 1).double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    data = TensorDataset(torch.linspace(-1, 1, length, dtype=torch.float64)[:, None])
    plan = BatchPlan(8, rank=rank, world=world, accumulation=accumulation)
    gradients = []
    for step in open_batches(Task(), data, plan).iterate(0):
        model.zero_grad()
        for part, share in zip(step, weighted_shares(Task(), step), strict=True):
            with use_share(share):
                weighted_loss(wrapped(part.batch[0]).exp().mean()).backward()
        gradients.append(gradients_of(model))
    return gradients


@pytest.mark.parametrize(("length", "accumulation"), [(13, 1), (17, 3)])
def test_ddp_gradients_are_those_of_one_process(length: int, accumulation: int) -> None:
    expected = _gradients(0, 1, length, 1)
    for rank in on_ranks(3, _gradients, length, accumulation):
        for found, whole in zip(rank, expected, strict=True):
            for a, b in zip(found, whole, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)


# Loaders that the task brings.


def test_a_loader_is_told_its_place_and_taken_as_it_is() -> None:
    seen = []

    def loader(context: LoaderContext) -> Iterator[list[Tensor]]:
        seen.append(context)
        yield from ([torch.full((context.batch_size,), float(k))] for k in range(4))

    batches = open_batches(Task(), loader, BatchPlan(6, seed=9, accumulation=2))
    steps = list(batches.iterate(epoch=5))
    assert seen[-1] == LoaderContext(rank=0, world=1, batch_size=3, epoch=5, seed=9)
    assert batches.steps_per_epoch is None
    assert "taken as it is" in batches.notes[0]
    assert [[part.batch[0][0].item() for part in step] for step in steps] == [[0.0, 1.0], [2.0, 3.0]]
    assert open_batches(Task(), tensors(4), BatchPlan(2)).notes == ()


def test_a_loader_with_a_length_tells_its_steps() -> None:
    def loader(context: LoaderContext) -> DataLoader[Any]:
        return DataLoader(tensors(10), batch_size=context.batch_size)

    assert open_batches(Task(), loader, BatchPlan(4)).steps_per_epoch == 3
    assert open_batches(Task(), loader, BatchPlan(4, accumulation=2)).steps_per_epoch == 3


class Stream(IterableDataset[Tensor]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(float(10 * self.epoch + k)) for k in range(5))


def test_a_stream_is_read_in_batches_of_its_epoch() -> None:
    steps = steps_of(Stream(), epoch=2, global_batch_size=2)
    assert list(map(numbers, steps)) == [[20.0, 21.0], [22.0, 23.0], [24.0]]


class NoisyStream(IterableDataset[Tensor]):
    """Eleven samples, drawn from the generators that everybody draws from."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.rand(()) + random.random() + float(np.random.rand()) for _ in range(11))

    def __len__(self) -> int:
        return 11


class Selfish(NoisyStream):
    """Gives each worker samples of its own."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(float(own_rank() * 100 + k)) for k in range(11))


def _noisy(own: int, world: int, num_data_workers: int = 0) -> Any:
    torch.manual_seed(own)
    plan = BatchPlan(4, 7, own, world, num_data_workers=num_data_workers)
    batches = open_batches(Task(), NoisyStream(), plan)
    found = []
    for step in batches.iterate(1):
        torch.rand(own + 1)  # what training draws in between
        found.append((step[0].batch.tolist()[: step[0].share.samples], step[0].share.samples, step[0].share.total))
    return batches.steps_per_epoch, batches.notes, found


@pytest.mark.parametrize("num_data_workers", [0, 1, 3])
def test_a_stream_is_shared_out_and_nothing_is_seen_twice(num_data_workers: int) -> None:
    """11 samples in global batches of 4, 4 and 3; with 5 workers some have no part in a batch."""
    steps, notes, alone = _noisy(0, 1, num_data_workers)
    assert (steps, notes) == (3, ())
    assert [samples for _, samples, _ in alone] == [4, 4, 3]
    for world in (2, 5):
        ranks = [found for _, _, found in on_ranks(world, _noisy, num_data_workers)]
        for k in range(3):
            assert list(chain.from_iterable(found[k][0] for found in ranks)) == alone[k][0]
            assert {found[k][2] for found in ranks} == {alone[k][1]}


class SelfishLater(NoisyStream):
    """The same first global batch, and then each worker's own."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(float(k if k < 4 else own_rank() * 100 + k)) for k in range(11))


def _selfish(own: int, world: int, kind: Any) -> str:
    with pytest.raises(TaskError) as raised:
        list(open_batches(Task(), kind(), BatchPlan(4, rank=own, world=world)).iterate(0))
    return str(raised.value)


class Thing:
    """A sample of a class that says nothing of itself."""


class Things(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Thing() for _ in range(4))


class Counting(Task):
    def collate(self, samples: list[Any]) -> Any:
        return torch.zeros(len(samples), 1)


def _things(own: int, world: int) -> int:
    return len(list(open_batches(Counting(), Things(), BatchPlan(4, rank=own, world=world)).iterate(0)))


def test_samples_of_any_class_come_in_a_stream() -> None:
    assert on_ranks(2, _things) == [1, 1]


@pytest.mark.parametrize("kind", [Selfish, SelfishLater])
def test_a_stream_that_differs_between_workers_is_an_error_everywhere(kind: Any) -> None:
    for message in on_ranks(2, _selfish, kind):
        assert "gives one worker other samples than another" in message
        assert "a function of LoaderContext" in message


class Shard:
    """What raycomp uses of a Ray Data shard."""

    def iter_torch_batches(self, *, batch_size: int) -> Iterator[dict[str, Tensor]]:
        return ({"x": part} for part in torch.arange(5.0).split(batch_size))


def test_ray_data_comes_in_batches() -> None:
    steps = steps_of(Shard(), global_batch_size=2)
    assert [part.batch["x"].tolist() for step in steps for part in step] == [[0, 1], [2, 3], [4]]


def _uneven_loaders(rank: int, world: int) -> list[tuple[int, int, float, int]]:
    task = Task()
    sizes = [[3, 3, 2], [3]][rank]

    def loader(context: LoaderContext) -> Iterator[list[Tensor]]:
        return ([torch.zeros(size)] for size in sizes)

    steps = open_batches(task, loader, BatchPlan(6, rank=rank, world=world)).iterate(0)
    parts = [(share, part) for step in steps for share, part in zip(weighted_shares(task, step), step, strict=True)]
    return [(share.samples, share.total, share.loss_weight, len(part.batch[0])) for share, part in parts]


def test_workers_whose_loaders_end_early_go_on_with_stand_ins() -> None:
    first, second = on_ranks(2, _uneven_loaders)
    assert first == [(3, 6, 1.0, 3), (3, 3, 2.0, 3), (2, 2, 2.0, 2)]
    assert second == [(3, 6, 1.0, 3), (0, 3, 0.0, 3), (0, 2, 0.0, 3)]


def _starved(rank: int, world: int) -> str:
    batches = open_batches(Task(), lambda context: [[torch.zeros(2)]][rank:], BatchPlan(4, rank=rank, world=world))
    with pytest.raises(TaskError) as raised:
        list(batches.iterate(0))
    return str(raised.value)


def test_a_worker_without_any_batch_is_an_error_everywhere() -> None:
    assert all("gave no batch at all" in message for message in on_ranks(2, _starved))


def _different_lengths(rank: int, world: int) -> str:
    with pytest.raises(TaskError) as raised:
        open_batches(Task(), tensors(5 + rank), BatchPlan(4, rank=rank, world=world))
    return str(raised.value)


def test_workers_that_see_different_data_are_an_error_everywhere() -> None:
    assert all("5 samples on one worker and 6 on another" in message for message in on_ranks(2, _different_lengths))


def test_what_ray_data_leaves_out_is_told() -> None:
    (note,) = open_batches(Task(), Shard(), BatchPlan(2)).notes
    assert "those of an epoch that don't divide evenly among them are left out" in note
