"""A task takes a step on two samples before a cluster is asked for anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from raycomp import Task
from raycomp.config import TrainingConfig, parse_job
from raycomp.errors import TaskError
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.preflight import check_stages
from raycomp.pipeline.rehearsal import rehearse_task
from tests.contracts import tiny
from tests.contracts.settings import settings

EPOCH = TrainingConfig(epochs=1)


class Small(Task):
    """Three classes."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def train_data(self) -> Any:
        return TensorDataset(torch.randn(9, 4), torch.randint(0, 3, (9,)))

    def eval_data(self) -> Any:
        return self.train_data()


def small(**methods: Any) -> Task:
    """A `Small` whose methods are replaced."""
    return type("Small", (Small,), methods)()


def test_the_metrics_names_are_known() -> None:
    assert rehearse_task(Small(), EPOCH, trains=True) == ("accuracy",)
    two = small(metrics=lambda self, output, batch: {"error": output.sum(1), "top": output[:, 0]})
    assert rehearse_task(two, EPOCH, trains=True) == ("error", "top")


@pytest.mark.parametrize("precision", ["float32", "bf16", "float64"])
def test_it_computes_in_the_jobs_precision(precision: Any) -> None:
    assert rehearse_task(Small(), TrainingConfig(epochs=1, precision=precision), trains=True) == ("accuracy",)


def test_loaders_and_streams_are_read_too() -> None:
    data = Small().train_data()
    loader = small(train_data=lambda self: lambda context: DataLoader(data, context.batch_size))
    assert rehearse_task(loader, EPOCH, trains=True) == ("accuracy",)


CASES: list[tuple[str, dict[str, Any]]] = [
    (r"Small\.training_step\(\) raised TypeError: .*takes 2 positional", {"loss": lambda self, output: output.sum()}),
    (r"train_data\(\): the train data is empty", {"train_data": lambda self: TensorDataset(torch.zeros(0, 4))}),
    (r"eval_data\(\): there is nothing to evaluate", {"eval_data": lambda self: TensorDataset(torch.zeros(0, 4))}),
    (r"finds no target|define target", {"train_data": lambda self: [torch.zeros(4)] * 4}),
    (r"loss of shape \[2\]", {"training_step": lambda self, model, batch: model(batch[0]).sum(1)}),
    (r"it gave float", {"training_step": lambda self, model, batch: 1.0}),
    (r"depends on no trainable", {"training_step": lambda self, model, batch: model(batch[0]).sum().detach()}),
    (r"dense model is nan", {"training_step": lambda self, model, batch: model(batch[0]).sum() * torch.nan}),
    (r"scheduler\(\) raised TypeError", {"scheduler": lambda self, optimizer: None}),
    (
        r"the step of Small\.optimizer\(\) raised TypeError",
        {"optimizer": lambda self, model: torch.optim.LBFGS(model.parameters())},
    ),
    (r"metric 'm' is \[2, 3\]", {"metrics": lambda self, output, batch: {"m": output}}),
    (r"Task\.metrics: it gave Tensor", {"metrics": lambda self, output, batch: output[:, 0]}),
    (r"Task\.metrics: it gave a mapping of \[\]", {"metrics": lambda self, output, batch: {}}),
    (r"Small\.metrics\(\) raised KeyError", {"metrics": lambda self, output, batch: {}["m"]}),
    (r"train_data\(\) raised ZeroDivisionError", {"train_data": lambda self: 1 // 0}),
]


@pytest.mark.parametrize(("message", "methods"), CASES)
def test_what_is_wrong_is_told(message: str, methods: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=message):
        rehearse_task(small(**methods), EPOCH, trains=True)


def test_a_backward_pass_that_raises_is_told() -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise TypeError("broken")

    def step(self: Task, model: nn.Module, batch: Any) -> Tensor:
        return Breaks.apply(model(batch[0])).sum()

    with pytest.raises(TaskError, match=r"training_step\(\)'s backward pass raised TypeError: broken"):
        rehearse_task(small(training_step=step), EPOCH, trains=True)


def test_what_only_calibrates_needs_no_loss() -> None:
    no_loss = small(loss=lambda self, output: 1 // 0)
    assert rehearse_task(no_loss, EPOCH, trains=False) == ("accuracy",)
    config = parse_job(tiny.job(settings("PtqQuantizer")))

    class Unlost(tiny.Tiny):
        def loss(self, output: Any, batch: Any) -> Tensor:
            raise AssertionError

    assert check_stages(config, Unlost()).metrics == ("accuracy",)


def test_the_check_of_a_job_rehearses() -> None:
    config = parse_job(tiny.job(tiny.pruner(training_steps=4)))
    assert check_stages(config, build_task(config.task)).metrics == ("accuracy",)

    class Empty(tiny.Tiny):
        def train_data(self) -> TensorDataset:
            return TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.long))

    with pytest.raises(TaskError, match="the data is empty"):
        check_stages(config, Empty())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer, steps: StepLR(optimizer, steps // 3),
        lambda optimizer, steps: OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=3 / steps),
        lambda optimizer, steps: CosineAnnealingWarmRestarts(optimizer, steps // 4),
    ],
)
def test_a_schedule_is_told_the_jobs_length(schedule: Any) -> None:
    task = small(scheduler=lambda self, optimizer, steps: schedule(optimizer, steps))
    assert rehearse_task(task, TrainingConfig(steps=6), trains=True)
    assert rehearse_task(task, TrainingConfig(epochs=2, global_batch_size=3), trains=True)


def test_two_samples_without_a_label_are_no_fault() -> None:
    labels = torch.full((9,), -100)
    assert rehearse_task(small(train_data=lambda self: TensorDataset(torch.randn(9, 4), labels)), EPOCH, trains=True)


def test_a_step_that_needs_more_than_two_samples_gets_a_workers_batch() -> None:
    def step(self: Task, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].view(-1, 4, 4)[:, 0]).sum()

    task = small(training_step=step, train_data=lambda self: TensorDataset(torch.randn(64, 4), torch.zeros(64).long()))
    assert rehearse_task(task, EPOCH, trains=True, samples=8)
    with pytest.raises(TaskError, match="shape"):
        rehearse_task(task, EPOCH, trains=True, samples=2)


def test_data_without_labels_reach_the_model() -> None:
    task = small(
        train_data=lambda self: TensorDataset(torch.randn(9, 4)),
        training_step=lambda self, model, batch: self.forward(model, batch).square().mean(),
        metrics=lambda self, output, batch: {"accuracy": output[:, 0]},
    )
    assert rehearse_task(task, EPOCH, trains=True) == ("accuracy",)
