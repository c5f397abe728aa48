"""What a training tells of its progress."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor, nn
from torch.utils.data import DataLoader

from raycomp.errors import TaskError
from raycomp.pipeline import LoaderContext
from raycomp.pipeline.training import stage_training
from raycomp.results.progress import ProgressEvent
from tests.contracts import tiny
from tests.contracts.settings import settings
from tests.contracts.training import Keeper, train


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
    with patch.object(stage_training, "_EVENT_EVERY_S", every_s):
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
