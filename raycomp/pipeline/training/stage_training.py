"""One stage's training on one process: alone, or as a rank of a process group. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raycomp.config import EvaluationConfig, TrainingConfig
from raycomp.core.batch_share import use_share
from raycomp.core.chain import Chain
from raycomp.core.reduction import Statistic, rank, reduce_, world_size
from raycomp.errors import ConfigError, Problem, TaskError
from raycomp.pipeline.build import weight_dtype
from raycomp.pipeline.data.batches import Batches, BatchPlan, MicroBatch, open_batches
from raycomp.pipeline.data.samples import sample_seed
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.task import Task
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.training.metrics import evaluate
from raycomp.pipeline.training.parallel import data_parallel, take_buffers_of_rank_0_
from raycomp.pipeline.user_code import user_code
from raycomp.results.progress import ProgressEvent

_EVENT_EVERY_S = 0.5


class Observer(Protocol):
    """Who follows a training."""

    def progress(self, event: ProgressEvent) -> None:
        """News, on rank 0 alone; must return at once."""

    def checkpoint(self, make: Callable[[], StageState], metrics: dict[str, float]) -> None:
        """The state may be saved now; every rank calls it, rank 0's is the one to save."""


@dataclass
class StageTraining:
    """One stage's training run.

    Args:
        name: the stage's.
        task: the user's.
        chain: the fused compressors, attached.
        training: batch size, length, precision, seed.
        evaluation: how each epoch's metrics are taken.
        observer: hears of progress and checkpoints.
        device: of this process.
        data: train and evaluation data where the task's own are not to be used (shards of Ray Data).
        started: `time.monotonic()` when the run began, for the elapsed time.
    """

    name: str
    task: Task
    chain: Chain
    training: TrainingConfig
    evaluation: EvaluationConfig
    observer: Observer
    device: torch.device
    data: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def run(self, resume: StageState | None = None) -> None:
        """Trains to the end, from the beginning or from a checkpoint. A collective.

        Raises:
            TaskError: the user's code raised.
            ConfigError: the training has no end.
        """
        model = data_parallel(
            self.chain.model,
            self.device,
            broadcast_buffers=not self.training.sync_batch_norm,
            find_unused_parameters=self.task.unused_parameters,
        )
        with user_code(self._call("optimizer")):
            optimizer = self.task.optimizer(self.chain.model)
        batches = open_batches(self.task, self._data("train"), self._batch_plan())
        self.steps = self._total_steps(batches)
        with user_code(self._call("scheduler")):
            scheduler = self.task.scheduler(optimizer, self.steps)
        self.step, epoch = 0, 0
        self.history: tuple[ProgressEvent, ...] = ()
        self.notes = batches.notes
        if resume is not None:
            self._restore(resume, optimizer, scheduler)
            self.step, self.history, epoch = resume.step, resume.history, resume.epoch
        self.eval_data = self._data("eval")
        with self.chain.run([optimizer]):
            while self.step < self.steps:
                self._epoch(epoch, model, batches, optimizer, scheduler)
                epoch += 1
                self._end_epoch(epoch, optimizer, scheduler)

    def _epoch(
        self, epoch: int, model: nn.Module, batches: Batches, optimizer: Optimizer, scheduler: LRScheduler | None
    ) -> None:
        # Seeding each epoch makes a resumed run draw what an undisturbed one draws (dropout).
        torch.manual_seed(sample_seed(self.training.seed, epoch, rank()))
        self.chain.model.train()
        self.loss_sum, self.loss_steps, last_event = torch.zeros((), device=self.device), 0, time.monotonic()
        for micro_batches in batches.iterate(epoch):
            self.loss_sum += self._step(model, micro_batches, optimizer)
            if scheduler is not None:
                scheduler.step()
            self.step += 1
            self.loss_steps += 1
            if rank() == 0 and self.step < self.steps and time.monotonic() - last_event > _EVENT_EVERY_S:
                last_event = time.monotonic()
                self.observer.progress(self._event(epoch + 1, float(self.loss_sum) / self.loss_steps, {}))
            if self.step >= self.steps:
                break
        if self.loss_steps == 0:
            raise TaskError(
                f"the train data gave no batch in epoch {epoch + 1}",
                where=self._call("train_data"),
                remedy="a loader must begin anew in each epoch",
            )

    def _step(self, model: nn.Module, micro_batches: list[MicroBatch], optimizer: Optimizer) -> Tensor:
        """One optimizer step; returns this rank's part of the global batch's loss, times the number of ranks."""
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self._gradients(model, last), use_share(micro_batch.share):
                batch = move_batch(micro_batch.batch, self.device, self._input_dtype)
                with self._autocast(), user_code(self._call("training_step")):
                    loss = self.task.training_step(model, batch)
                with self._autocast():
                    objective = self.chain.loss(loss, batch)
                (objective * micro_batch.loss_weight).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * micro_batch.loss_weight
        self._check_gradients(model)
        optimizer.step()
        return total

    def _check_gradients(self, model: nn.Module) -> None:
        """DDP would fail in the next step, and name its own argument instead of the task's attribute."""
        if self.step > 0 or model is self.chain.model or self.task.unused_parameters:
            return
        named = self.chain.model.named_parameters()
        unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if unused:
            raise TaskError(
                f"the training step gave no gradient to {', '.join(unused[:8])}",
                where=self._call("training_step"),
                remedy="set unused_parameters = True in the task, or requires_grad = False on them",
            )

    def _end_epoch(self, epoch: int, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        if not self.training.sync_batch_norm:
            take_buffers_of_rank_0_(self.chain.model)
        mean = self.loss_sum.double() / max(self.loss_steps, 1)
        reduce_([Statistic(mean, "sum")])
        with self._autocast():
            metrics = evaluate(
                self.task,
                self.chain.model,
                self.eval_data,
                batch_size=self.evaluation.batch_size,
                device=self.device,
                dtype=self._input_dtype,
                max_samples=self.evaluation.max_samples,
                rank=rank(),
                world=world_size(),
                num_data_workers=self.training.num_data_workers,
            )
        event = self._event(epoch, float(mean) / world_size(), metrics)
        self.history = (*self.history, event)
        if rank() == 0:
            self.observer.progress(event)
        if epoch % self.training.checkpoint_every_epochs == 0 or self.step >= self.steps:
            self.observer.checkpoint(lambda: self._state(epoch, optimizer, scheduler), metrics)

    def _state(self, epoch: int, optimizer: Optimizer, scheduler: LRScheduler | None) -> StageState:
        training = {
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "chain": self.chain.state_dict(),
        }
        model = self.chain.model.state_dict()
        return StageState(self.name, epoch, self.step, model, training, self.history, self.notes)

    def _restore(self, state: StageState, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self.chain.model.load_state_dict(state.model)
        self.chain.load_state_dict(state.training["chain"])
        optimizer.load_state_dict(state.training["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state.training["scheduler"])

    def _event(self, epoch: int, loss: float, metrics: dict[str, float]) -> ProgressEvent:
        per_epoch = max(self.step // max(epoch, 1), 1)
        epochs = self.training.epochs or max(epoch, -(-self.steps // per_epoch))
        elapsed = time.monotonic() - self.started
        return ProgressEvent(
            self.name, epoch, epochs, self.step, self.steps, loss, metrics, self.chain.sparsity(), world_size(), elapsed
        )

    def _gradients(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.training.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    @property
    def _input_dtype(self) -> torch.dtype:
        return weight_dtype(self.training)

    def _batch_plan(self) -> BatchPlan:
        training = self.training
        return BatchPlan(
            training.global_batch_size,
            training.seed,
            rank(),
            world_size(),
            training.gradient_accumulation,
            training.num_data_workers,
        )

    def _total_steps(self, batches: Batches) -> int:
        if self.training.steps is not None:
            return self.training.steps
        if batches.steps_per_epoch is None:
            message = "the train data can't tell its length, so a number of epochs has no number of steps"
            raise ConfigError([Problem("training.epochs", message, "set training.steps instead")])
        return (self.training.epochs or 1) * batches.steps_per_epoch

    def _data(self, split: str) -> Any:
        if split in self.data:
            return self.data[split]
        with user_code(self._call(f"{split}_data")):
            return getattr(self.task, f"{split}_data")()

    def _call(self, method: str) -> str:
        return f"{type(self.task).__name__}.{method}()"
