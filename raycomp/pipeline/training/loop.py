"""One stage's training on one process: alone, or as a rank of a process group. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raycomp.config import EvaluationConfig, TrainingConfig
from raycomp.core.batch_share import BatchShare, use_share, weighted_loss
from raycomp.core.chain import Chain
from raycomp.core.evaluator import Trainee
from raycomp.core.first_place import THE_BATCH
from raycomp.core.moments import RunContext
from raycomp.core.reduction import Statistic, gathered, rank, reduce_, world_size
from raycomp.core.rounds import conduct
from raycomp.core.seeds import derived_seed, seed_everything
from raycomp.errors import ConfigError, NotFiniteError, Problem, TaskError
from raycomp.pipeline.build import weight_dtype
from raycomp.pipeline.data.batches import open_batches
from raycomp.pipeline.data.plan import BatchPlan, MicroBatch
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.task import Task, given_data
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.training.metrics import evaluate
from raycomp.pipeline.training.parallel import data_parallel, take_buffers_of_rank_0_
from raycomp.pipeline.training.schedule import step_schedule
from raycomp.pipeline.training.shares import weighted_shares
from raycomp.pipeline.user_code import user_code
from raycomp.results.progress import ProgressEvent

_EVENT_EVERY_S = 0.5


def endless(where: str) -> Problem:
    """What is wrong with a training of epochs over data that doesn't know its length.

    Args:
        where: the training's key.
    """
    message = "the train data can't tell its length, so a number of epochs has no number of steps"
    return Problem(f"{where}.epochs", message, "set training.steps instead")


class Listener(Protocol):
    """Who follows a training."""

    def progress(self, event: ProgressEvent) -> None:
        """News, on rank 0 alone; must return at once."""

    def checkpoint(self, make: Callable[[], StageState], metrics: dict[str, float]) -> None:
        """The state may be saved now; every rank calls it, rank 0's is the one to save."""


@dataclass
class StageTraining:
    """One stage's training: the evaluator of its compressors, over a job's data and with checkpoints.

    Args:
        name: the stage's.
        task: the user's.
        chain: the fused compressors, attached.
        training: batch size, length of a round, precision, seed.
        evaluation: how each epoch's metrics are taken.
        listener: hears of progress and checkpoints.
        device: of this process.
        data: train and evaluation data where the task's own are not to be used (shards of Ray Data).
        started: `time.time()` when the run began, for the elapsed time.
    """

    name: str
    task: Task
    chain: Chain
    training: TrainingConfig
    evaluation: EvaluationConfig
    listener: Listener
    device: torch.device
    data: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def run(self, resume: StageState | None = None) -> None:
        """Trains all rounds and calibrates, from the beginning or from a checkpoint. A collective.

        Raises:
            TaskError: the user's code raised.
            ConfigError: the training has no end.
        """
        self.chain.evaluator = self
        self.model = data_parallel(
            self.chain.model,
            self.device,
            broadcast_buffers=not self.training.sync_batch_norm,
            find_unused_parameters=self.task.unused_parameters,
        )
        self.batches = open_batches(self.task, self._data("train"), self._batch_plan())
        self.eval_data = self._data("eval")
        self.rounds = max(self.chain.rounds, 1) if self.chain.wants_training else 0
        self.steps = sum(map(self._steps_of, range(self.rounds)))
        self.epoch = self.saved_epoch = 0
        self.loss_sum, self.loss_steps = torch.zeros((), device=self.device), 0
        self.history: tuple[ProgressEvent, ...] = ()
        self.notes = self.batches.notes
        if resume is not None:
            self._restore_model(resume)
        self.reset()
        if resume is not None:
            self._restore(resume)
        try:
            conduct(self.chain, self.rounds)
        except NotFiniteError as error:
            raise self._told_by_all(error) from None

    # What the compressors ask for.

    @property
    def example(self) -> Any:
        """The task's example input."""
        return self.chain.example

    def train(self, trainee: Trainee, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """One round, from where it stands; how long it is, the job has said."""
        schedulers = [] if self.scheduler is None else [self.scheduler]
        context = RunContext(
            [self.optimizer],
            schedulers,
            self.batches.steps_per_epoch,
            self.round_steps,
            self.example,
            lambda: self.evaluate(self.chain.model),
        )
        with trainee.run(context):
            ended = False
            while not ended:
                self._epoch()
                self.epoch += 1
                ended = self.chain.steps_in_round >= self.round_steps
                if ended:
                    trainee.end_round()
                self._end_epoch(last=ended)

    def calibrate(self, trainee: Trainee, max_steps: int | None = None) -> None:
        """Passes the training batches through the model, forward only, and saves what came of it."""
        seed_everything(derived_seed(self.training.seed, self.epoch, rank()))
        with trainee.calibrating():
            for micro_batches in islice(self.batches.iterate(self.epoch), max_steps):
                for micro_batch in micro_batches:
                    batch = move_batch(micro_batch.batch, self.device, self._input_dtype)
                    share = self._with_positions(micro_batch.share, batch)
                    with use_share(share), self._autocast(), user_code(self._call("forward")):
                        trainee.calibration_step(partial(self.task.forward, self.chain.model, batch))
        self.epoch += 1
        self.loss_steps = 0
        self._end_epoch(last=True)

    def evaluate(self, model: nn.Module) -> float:
        """The job's main metric: the first one."""
        return next(iter(self._metrics(model).values()))

    def reset(self) -> None:
        """A fresh optimizer and schedule, over the model as its user wrote it."""
        with self.chain.space.as_written(), user_code(self._call("optimizer")):
            self.optimizer = self.task.optimizer(self.chain.model)
        with user_code(self._call("scheduler")):
            self.scheduler = self.task.scheduler(self.optimizer, self.round_steps) if self.rounds else None
        unheld = self.chain.unheld_parameters([self.optimizer]) if self.rounds else []
        if unheld:
            note = f"no optimizer holds {', '.join(unheld[:8])}: they do not train"
            self.notes = tuple(dict.fromkeys([*self.notes, note]))

    # Training.

    def _epoch(self) -> None:
        # Seeding each epoch makes a resumed run draw what an undisturbed one draws (dropout).
        seed_everything(derived_seed(self.training.seed, self.epoch, rank()))
        self.chain.model.train()
        self.loss_sum, self.loss_steps, last_event = torch.zeros((), device=self.device), 0, time.monotonic()
        for micro_batches in self.batches.iterate(self.epoch):
            self.loss_sum += self._step(micro_batches)
            step_schedule(self.scheduler, self._call("scheduler"))
            self.loss_steps += 1
            if rank() == 0 and self.chain.step < self.steps and time.monotonic() - last_event > _EVENT_EVERY_S:
                last_event = time.monotonic()
                self.listener.progress(self._event(self.epoch + 1, float(self.loss_sum) / self.loss_steps, {}))
            if self.chain.steps_in_round >= self.round_steps:
                break
        if self.loss_steps == 0:
            raise TaskError(
                f"the train data gave no batch in epoch {self.epoch + 1}",
                where=self._call("train_data"),
                remedy="a loader must begin anew in each epoch" if self.epoch else "give each worker a sample at least",
            )

    def _step(self, micro_batches: list[MicroBatch]) -> Tensor:
        """One optimizer step; returns this rank's part of the global batch's loss, times the number of ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for index, share in enumerate(weighted_shares(self.task, micro_batches)):
            last = index == len(micro_batches) - 1
            batch = move_batch(micro_batches[index].batch, self.device, self._input_dtype)
            with self._gradients(self.model, last), use_share(self._with_positions(share, batch)):
                losses: list[Tensor] = []
                with self._autocast():
                    objective = self.chain.training_step(partial(self._training_step, batch, losses), batch)
                with user_code(f"the backward pass of {self._call('training_step')}"):
                    objective.backward()
                total += weighted_loss(losses[0].detach())
        self._check_gradients()
        with user_code(f"the step of {self._call('optimizer')}"):
            self.optimizer.step()
        return total

    def _with_positions(self, share: BatchShare, batch: Any) -> BatchShare:
        with user_code(self._call("attention_mask")):
            return replace(share, positions=self.task.attention_mask(batch))

    def _training_step(self, batch: Any, losses: list[Tensor]) -> Tensor:
        with user_code(self._call("training_step")):
            losses.append(self.task.training_step(self.model, batch))
        return losses[0]

    def _told_by_all(self, error: NotFiniteError) -> NotFiniteError:
        """The same on every rank; all meet it at once, and the one whose samples did it knows where it began."""
        told = gathered((error.what, error.began))
        what, began = min(told, key=lambda each: (each[1] is None, each[1] != THE_BATCH))
        saved = (
            f"the checkpoint of epoch {self.saved_epoch} is good" if self.saved_epoch else "there is no checkpoint yet"
        )
        return NotFiniteError(what, began=began, remedy=f"{error.remedy}; {saved}")

    def _check_gradients(self) -> None:
        """DDP would fail in the next step, and name its own argument instead of the task's attribute."""
        if self.chain.step > 0 or self.model is self.chain.model or self.task.unused_parameters:
            return
        with self.chain.space.as_written():
            named = list(self.chain.model.named_parameters())
        unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        if unused:
            raise TaskError(
                f"the training step gave no gradient to {', '.join(unused[:8])}",
                where=self._call("training_step"),
                remedy="set unused_parameters = True in the task, or requires_grad = False on them",
            )

    def _end_epoch(self, *, last: bool) -> None:
        if not self.training.sync_batch_norm:
            take_buffers_of_rank_0_(self.chain.model)
        metrics = self._metrics(self.chain.model)
        event = self._event(self.epoch, self._mean_loss(), metrics)
        step_schedule(self.scheduler, self._call("scheduler"), metric=next(iter(metrics.values())))
        self.history = (*self.history, event)
        if rank() == 0:
            self.listener.progress(event)
        if last or self.epoch % self.training.checkpoint_every_epochs == 0:
            self.chain.finite.check_weights(self.chain.step)
            self.chain.settle()
            self.saved_epoch = self.epoch
            self.listener.checkpoint(self._state, event.metrics)

    def _mean_loss(self) -> float | None:
        """The epoch's, over all ranks; None where nothing trained."""
        if not self.loss_steps:
            return None
        mean = self.loss_sum.double() / self.loss_steps
        reduce_([Statistic(mean, "mean", "loss")])
        return float(mean)

    def _metrics(self, model: nn.Module) -> dict[str, float]:
        with self._autocast():
            return evaluate(
                self.task,
                model,
                self.eval_data,
                batch_size=self.evaluation.batch_size,
                device=self.device,
                dtype=self._input_dtype,
                max_samples=self.evaluation.max_samples,
                rank=rank(),
                world=world_size(),
                num_data_workers=self.training.num_data_workers,
            )

    # Going on later.

    def _state(self) -> StageState:
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "chain": self.chain.state_dict(),
        }
        notes = tuple(dict.fromkeys([*self.notes, *self.chain.notes]))
        model = self.chain.model.state_dict()
        return StageState(self.name, self.epoch, self.chain.step, model, training, self.history, notes)

    def _restore_model(self, state: StageState) -> None:
        """First: optimizer and schedule are built for the round that is under way."""
        self.chain.model.load_state_dict(state.model)
        self.chain.load_state_dict(state.training["chain"])

    def _restore(self, state: StageState) -> None:
        self.optimizer.load_state_dict(state.training["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state.training["scheduler"])
        self.epoch, self.history = state.epoch, state.history
        self.saved_epoch = state.epoch
        self.notes = tuple(dict.fromkeys([*state.notes, *self.notes]))
        if self.history:
            # Where another process began the run, its clock stood still until this one went on.
            self.started = min(self.started, time.time() - self.history[-1].elapsed_s)

    def _event(self, epoch: int, loss: float | None, metrics: dict[str, float]) -> ProgressEvent:
        # Without a length, as many steps as the epochs so far had; a calibration is one more epoch.
        per_epoch = self.batches.steps_per_epoch or max(-(-self.chain.step // max(epoch, 1)), 1)
        epochs = max(epoch, sum(-(-self._steps_of(round) // per_epoch) for round in range(self.rounds)))
        elapsed = time.time() - self.started
        return ProgressEvent(
            self.name,
            epoch,
            epochs,
            self.chain.step,
            self.steps,
            loss,
            metrics,
            self.chain.sparsity(),
            world_size(),
            elapsed,
            float(self.optimizer.param_groups[0]["lr"]) if self.rounds else None,
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

    @property
    def round_steps(self) -> int:
        """The optimizer steps of the round under way."""
        return self._steps_of(self.chain.round)

    def _steps_of(self, round: int) -> int:
        epochs, per_epoch = self.chain.epochs_of(round), self.batches.steps_per_epoch
        if epochs is not None and per_epoch is not None:
            return epochs * per_epoch
        steps = None if epochs is not None else self.training.steps_over(per_epoch)
        if steps is None:
            raise ConfigError([endless("training")])
        return steps

    def _data(self, split: str) -> Any:
        if split in self.data:
            return self.data[split]
        return given_data(self.task, split)

    def _call(self, method: str) -> str:
        return f"{type(self.task).__name__}.{method}()"
