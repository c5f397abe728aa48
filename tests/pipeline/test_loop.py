"""What a training tells of its progress, and what it asks of the user's code."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from raycomp.core.reduction import rank, world_size
from raycomp.errors import NotFiniteError, TaskError
from raycomp.pipeline import LoaderContext
from raycomp.pipeline.training import loop
from raycomp.results.progress import ProgressEvent
from tests.contracts import tiny
from tests.contracts import training as contracts_training
from tests.contracts.settings import settings
from tests.contracts.training import Keeper, train
from tests.pipeline.ranks import on_ranks


class Counting(tiny.Tiny):
    """The loss is 1, 2, 3, …; 49 samples in batches of 16 are 4 steps an epoch."""

    count = 0

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        self.count += 1
        loss = super().training_step(model, batch)
        return loss - loss.detach() + self.count


class Streamed(Counting):
    """The same, of a length that nobody knows."""

    def train_data(self) -> Any:
        data = super().train_data()
        return lambda context: DataLoader(data, context.batch_size)


class Once(Streamed):
    """Its loader can be read a single time."""

    def train_data(self) -> Any:
        batches = iter(super().train_data()(LoaderContext(0, 1, 16, 0, 0)))
        return lambda context: batches


class Listening(Keeper):
    """Keeps all news."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[ProgressEvent] = []

    def progress(self, event: ProgressEvent) -> None:
        self.events.append(event)


def told(compressor: dict[str, Any], task: str = "Counting", every_s: float = 1e9, **training: Any) -> Any:
    raw = tiny.job(compressor, **training)
    raw["task"]["entrypoint"] = f"{__name__}:{task}"
    listener = Listening()
    with patch.object(loop, "_EVENT_EVERY_S", every_s):
        train(raw, listener)
    return listener.events


def test_in_an_epoch_the_mean_loss_so_far_is_told_and_at_its_end_the_metrics() -> None:
    events = told(tiny.distiller(), every_s=-1.0, steps=6)
    first = [(1, step, False) for step in (1, 2, 3, 4)]
    found = [(event.epoch, event.step, bool(event.metrics)) for event in events]
    assert found == [*first, (1, 4, True), (2, 5, False), (2, 6, True)]
    assert [event.loss for event in events] == pytest.approx([1, 1.5, 2, 2.5, 2.5, 5, 5.5])


@pytest.mark.parametrize("task", ["Counting", "Streamed"])
def test_a_last_epoch_that_is_cut_short_is_one_of_those_foretold(task: str) -> None:
    events = told(tiny.distiller(), task, steps=18)
    assert [event.epoch for event in events] == [1, 2, 3, 4, 5]
    assert {(event.epochs, event.steps) for event in events} == {(5, 18)}


def test_epochs_are_those_of_all_rounds() -> None:
    events = told(settings("LotteryTicketPruner"), steps=None, epochs=2)
    assert [event.epoch for event in events] == [1, 2, 3, 4, 5, 6]
    assert {(event.epochs, event.steps) for event in events} == {(6, 24)}


def test_a_calibration_is_one_epoch() -> None:
    events = told(settings("PtqQuantizer"), steps=None, epochs=2)
    assert [(event.epoch, event.epochs) for event in events] == [(1, 1)]


def test_a_loader_that_does_not_begin_anew_is_an_error() -> None:
    with pytest.raises(TaskError, match="no batch in epoch 2"):
        told(tiny.distiller(), "Once", steps=8)


class Spare(Counting):
    """Has a layer that nothing uses, and doesn't say so."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "spare": True})
        self.unused_parameters = False


def test_alone_a_layer_that_nothing_uses_does_no_harm() -> None:
    assert [event.step for event in told(tiny.distiller(), "Spare", steps=2)] == [2]


def _spare_on_a_rank(rank: int, world: int) -> str:
    with pytest.raises(TaskError) as raised:
        told(tiny.distiller(), "Spare", steps=2)
    return str(raised.value)


def test_on_several_workers_it_must_be_told() -> None:
    for message in on_ranks(2, _spare_on_a_rank):
        assert "gave no gradient to spare.weight, spare.bias" in message
        assert "unused_parameters = True" in message


def test_the_loss_of_a_step_is_that_of_its_micro_batches_by_their_samples() -> None:
    """The second step has three samples left: two in the first micro-batch, one in the second."""
    events = told(tiny.distiller(), steps=2, gradient_accumulation=2, global_batch_size=4, arguments={"samples": 7})
    assert [event.loss for event in events] == [pytest.approx(((1 + 2) / 2 + (2 * 3 + 1 * 4) / 3) / 2)]


class Broken(Counting):
    """One of its methods raises."""

    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self.raises)

    def raises(self, *_: Any) -> Any:
        raise KeyError("broken")


@pytest.mark.parametrize("method", ["eval_data", "optimizer", "scheduler", "training_step", "metrics"])
def test_what_the_users_code_raises_is_named(method: str) -> None:
    with pytest.raises(TaskError, match=rf"Broken\.{method}\(\) raised KeyError"):
        told(tiny.distiller(), "Broken", steps=2, arguments={"method": method})


class Diverging(tiny.Tiny):
    """From the seventh step on, the last worker meets a pixel that is no number."""

    steps = 0

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        self.steps += 1
        images, target = batch
        if self.steps > 6 and rank() == world_size() - 1:
            images = images.clone()
            images[0, 0, 0, 0] = torch.nan
        return super().training_step(model, (images, target))


def _diverges(number: int, world: int) -> tuple[str, int]:
    raw = tiny.job(tiny.pruner(training_steps=2), steps=12)
    raw["task"]["entrypoint"] = f"{__name__}:Diverging"
    keeper = Keeper()
    with pytest.raises(NotFiniteError) as raised:
        train(raw, keeper)
    return str(raised.value), len(keeper.metrics)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_that_is_not_finite_ends_the_training_on_all_ranks(world: int) -> None:
    """The last rank's batch is bad; all say so alike, with the step and the last checkpoint before it."""
    told = on_ranks(world, _diverges) if world > 1 else [_diverges(0, 1)]
    for message, checkpoints in told:
        assert message == (
            "in step 7 the loss is not finite; it began in the batch (look at that batch's values, or lower the "
            "learning rate; the checkpoint of epoch 1 is good)"
        )
        assert checkpoints == 1


class Plateau(tiny.Tiny):
    """Its accuracy is told by how often it was evaluated: 0.5, 0.6, 0.6, 0.6, 0.6."""

    evaluations = 0

    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]:
        self.evaluations += 1
        value = 0.5 if self.evaluations == 1 else 0.6
        return {"accuracy": torch.full((len(batch[1]),), value, dtype=torch.float64)}

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        self.optimized = optimizer
        self.rates: list[float] = []
        return ReduceLROnPlateau(optimizer, mode="max", patience=1, factor=0.5)

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        self.rates.append(self.optimized.param_groups[0]["lr"])
        return super().training_step(model, batch)


def test_a_plateau_schedule_follows_the_epochs_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs 3 and 4 bring nothing, with a patience of 1: epochs 5 and 6 train at half the rate."""
    raw = tiny.job(tiny.pruner(training_steps=2), steps=None, epochs=6, global_batch_size=49)
    raw["evaluation"]["batch_size"] = 64
    tasks: list[Plateau] = []
    monkeypatch.setattr(contracts_training, "build_task", lambda config: tasks.append(Plateau()) or tasks[-1])
    train(raw)
    assert tasks[0].rates == pytest.approx([0.05] * 4 + [0.025] * 2)


class Disturbed(tiny.Tiny):
    """What it does beside the forward pass raises."""

    def __init__(self, where: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.where = where

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: self._raises() if self.where == "scheduler" and step else 1.0)

    def teacher_predict(self, batch: Any, teacher: nn.Module) -> Any:
        return self._raises() if self.where == "teacher_predict" else super().teacher_predict(batch, teacher)

    def count_samples(self, batch: Any) -> int:
        return self._raises() if self.where == "count_samples" else super().count_samples(batch)

    def loss_items(self, batch: Any) -> int:
        return self._raises() if self.where == "loss_items" else super().loss_items(batch)

    def attention_mask(self, batch: Any) -> Any:
        return self._raises() if self.where == "attention_mask" else super().attention_mask(batch)

    def _raises(self) -> Any:
        raise TypeError("broken")


@pytest.mark.parametrize("where", ["scheduler", "teacher_predict", "count_samples", "loss_items", "attention_mask"])
def test_all_of_the_users_code_is_under_one_guard(where: str) -> None:
    with pytest.raises(TaskError, match=rf"Disturbed\.{where}\(\) raised TypeError: broken"):
        told(tiny.distiller(), "Disturbed", steps=2, arguments={"where": where})
