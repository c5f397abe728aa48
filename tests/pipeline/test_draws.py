"""What a training draws: its order of samples and its dropout, by seed, epoch and worker."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, random_split

from raycomp.config import parse_job
from raycomp.core.reduction import rank
from raycomp.pipeline.data import global_batches
from raycomp.pipeline.data.batches import open_batches
from raycomp.pipeline.data.plan import BatchPlan
from raycomp.pipeline.ending import figures
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.notes import Notes
from raycomp.pipeline.preflight import check_stages
from raycomp.pipeline.task import given_data
from tests.contracts import tiny
from tests.contracts.training import Keeper, differing, train, weights_of
from tests.pipeline.ranks import on_ranks

Epochs = dict[int, list["Draw"]]
_drawn: Epochs = defaultdict(list)


class Draw(NamedTuple):
    """A training step's samples, and numbers that dropout would take next."""

    samples: list[float]
    noise: list[float]


class Drawing(tiny.Tiny):
    """Keeps what each training step got."""

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        noise = torch.rand(4)
        _drawn[len(_drawn) - 1].append(Draw(batch[0][:, 0, 0, 0].tolist(), noise.tolist()))
        return super().training_step(model, batch)


class Counter(Keeper):
    """Opens a new epoch's list after each checkpoint, of which there is one an epoch."""

    def checkpoint(self, *args: Any) -> None:
        _drawn[len(_drawn)] = []
        super().checkpoint(*args)


def drawn(seed: int = 0, resume: Path | None = None, folder: Path | None = None, end_after: int | None = None) -> Any:
    """The draws of each of three epochs of four steps, or of those after the checkpoint."""
    _drawn.clear()
    _drawn[0] = []
    raw = tiny.job(tiny.distiller(), steps=12, seed=seed)
    raw["task"]["entrypoint"] = f"{__name__}:Drawing"
    train(raw, Counter(folder, end_after), resume)
    return [epoch for epoch in _drawn.values() if epoch]


def test_epochs_draw_anew_and_a_resumed_one_draws_the_same(tmp_path: Path) -> None:
    first, second, third = drawn()
    assert [len(epoch) for epoch in (first, second, third)] == [4, 4, 4]
    values = [sorted(value for draw in epoch for value in draw.samples) for epoch in (first, second, third)]
    assert values[0] == values[1] == values[2]
    for one, other in ((first, second), (second, third), (first, third)):
        assert [draw.samples for draw in one] != [draw.samples for draw in other]
        assert one[0].noise != other[0].noise
    assert drawn(folder=tmp_path, end_after=1) == [first]
    torch.rand(7)
    assert drawn(resume=tmp_path) == [second, third]


def test_another_seed_draws_another_order_and_dropout() -> None:
    one, other = drawn(seed=1)[0], drawn(seed=2)[0]
    assert one[0].samples != other[0].samples
    assert one[0].noise != other[0].noise


def drawn_on_a_rank(own: int, world: int) -> Any:
    assert rank() == own
    return drawn()


def test_workers_drop_out_differently() -> None:
    first, second = on_ranks(2, drawn_on_a_rank)
    assert first[0][0].noise != second[0][0].noise


class Careless(tiny.Tiny):
    """Draws from all generators that need no name: in its model, its data, its augmentation and its steps."""

    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            model.fc.bias.copy_(torch.tensor(numpy.random.randn(3)) + random.random())  # type: ignore[union-attr]
        return model

    def train_data(self) -> Any:
        return random_split(super().train_data(), [40, 9])[0]

    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        return sample[0] + float(numpy.random.rand()) + random.random(), sample[1]

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        images, target = batch
        noise = torch.tensor(numpy.random.randn(*images.shape), dtype=images.dtype)
        return super().training_step(model, (images + noise * random.random(), target))


def careless(disturb: int, resume: Path | None = None, keeper: Keeper | None = None) -> Any:
    for seed in (numpy.random.seed, random.seed, torch.manual_seed):
        seed(disturb)
    raw = tiny.job(tiny.pruner(training_steps=4), tiny.quantizer(), steps=9)
    raw["task"]["entrypoint"] = f"{__name__}:Careless"
    return weights_of(train(raw, keeper, resume))


def test_numpys_and_pythons_draws_are_the_jobs_too(tmp_path: Path) -> None:
    expected = careless(1)
    assert differing(careless(2), expected) == []
    careless(3, keeper=Keeper(tmp_path, end_after=1))
    assert differing(careless(4, resume=tmp_path), expected) == []


class Loaded(tiny.Tiny):
    """Augments, and collates, at random."""

    def augment(self, sample: Any, generator: torch.Generator) -> Any:
        return sample[0] * float(numpy.random.rand()) * random.random() * torch.rand(()), sample[1]

    def collate(self, samples: list[Any]) -> Any:
        images, target = super().collate(samples)
        return images + float(numpy.random.rand()) * random.random() * torch.rand(()), target


def first_batch(world: int, rank: int, num_data_workers: int = 0) -> Tensor:
    task = Loaded()
    plan = BatchPlan(16, 5, rank, world, num_data_workers=num_data_workers)
    return next(iter(open_batches(task, task.train_data(), plan).iterate(3)))[0].batch[0]


def test_loading_processes_draw_what_one_process_draws() -> None:
    assert torch.equal(first_batch(1, 0), first_batch(1, 0, num_data_workers=2))


def test_what_is_drawn_for_a_sample_is_the_same_on_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loaded, "collate", tiny.Tiny.collate)
    monkeypatch.setattr(global_batches, "reduce_", lambda statistics: None)
    assert torch.equal(torch.cat([first_batch(2, rank) for rank in range(2)]), first_batch(1, 0))


class Drawn(tiny.Tiny):
    """Draws which of its samples are for training and which for evaluation; an image's first pixel is its number."""

    made = 0

    def train_data(self) -> Any:
        type(self).made += 1
        return self._split()[0]

    def eval_data(self) -> Any:
        return self._split()[1]

    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]:
        return {"number": batch[0][:, 0, 0, 0].double()}

    def _split(self) -> Any:
        images = torch.arange(24.0).view(24, 1, 1, 1).expand(24, 1, 6, 6)
        return random_split(TensorDataset(images, torch.zeros(24, dtype=torch.int64)), [16, 8])


def drawn_job(*seeds: int) -> dict[str, Any]:
    raw = tiny.job(tiny.pruner("L1NormPruner"), steps=2)
    raw["task"]["entrypoint"] = f"{__name__}:Drawn"
    stages = [{**raw["stages"][0], "name": f"s{seed}", "training": {"seed": seed, "steps": 2}} for seed in seeds]
    return {**raw, "stages": stages}


def test_what_is_drawn_for_evaluation_is_the_same_in_training_and_in_the_report() -> None:
    """Else the report's metrics are of other samples, some of them trained on, for every seed but one."""
    keeper, raw = Keeper(), drawn_job(5)
    train(raw, keeper)
    job = parse_job(raw)
    task = build_task(job.task)
    assert keeper.metrics == figures._metrics(job, task, {"dense": task.model()}, Notes())["dense"]
    held = [given_data(task, split).indices for split in ("train", "eval")]
    assert sorted(held[0] + held[1]) == list(range(24))
    other = Keeper()
    train(drawn_job(6), other)
    assert other.metrics == keeper.metrics


def test_data_are_made_once_before_a_run() -> None:
    """However many stages ask for their length, an example and a step: to make them may take minutes."""
    job = parse_job(drawn_job(5, 6, 7))
    Drawn.made = 0
    check_stages(job, build_task(job.task))
    assert Drawn.made == 1
