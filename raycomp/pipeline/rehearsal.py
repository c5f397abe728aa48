"""One step of all that a task does in training and evaluation, on two samples: what is wrong is told in seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raycomp.config import TrainingConfig
from raycomp.core.batch_share import use_share
from raycomp.errors import TaskError
from raycomp.pipeline.build import dense_model, weight_dtype
from raycomp.pipeline.data.batches import open_batches
from raycomp.pipeline.data.plan import BatchPlan, TorchBatches
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.task import Task, given_data
from raycomp.pipeline.training.metrics import evaluate
from raycomp.pipeline.training.schedule import step_schedule
from raycomp.pipeline.training.shares import weighted_shares
from raycomp.pipeline.user_code import user_code

_SAMPLES = 2
_ANY_LENGTH = 1000
"""Steps of an epoch of data that doesn't know its length."""


def rehearse_task(task: Task, training: TrainingConfig, *, trains: bool, samples: int = 0) -> tuple[str, ...]:
    """Takes one optimizer step and the metrics of two samples on a model of its own, on the CPU.

    Data of Ray's is left out, because reading it needs the cluster.

    Args:
        task: the user's, prepared.
        training: length, precision and seed.
        trains: whether any stage trains; one that only calibrates needs no loss.
        samples: of a worker's batch, which the step is tried with if it fails with two: it may need more.

    Returns:
        The names of the task's metrics, the main one first; none where they can't be known without a cluster.

    Raises:
        TaskError: what the task's code raised, or what it gave that can't serve.
    """
    dtype = weight_dtype(training)
    train_data = given_data(task, "train")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.precision == "bf16"):
        if trains and not isinstance(train_data, TorchBatches):
            try:
                _step(task, train_data, training, _SAMPLES)
            except TaskError:
                if samples <= _SAMPLES:
                    raise
                _step(task, train_data, training, samples)
        eval_data = given_data(task, "eval")
        if isinstance(eval_data, TorchBatches):
            return ()
        model = dense_model(task, training.seed).to(dtype=dtype)
        return tuple(evaluate(task, model, eval_data, batch_size=_SAMPLES, dtype=dtype, max_samples=_SAMPLES))


def _step(task: Task, data: Any, training: TrainingConfig, samples: int) -> None:
    name, dtype = type(task).__name__, weight_dtype(training)
    step = next(iter(open_batches(task, data, BatchPlan(samples, training.seed)).iterate(0)), None)
    if step is None:
        raise TaskError("the train data gave no batch", where=f"{name}.train_data()")
    model = dense_model(task, training.seed).to(dtype=dtype)
    with user_code(f"{name}.optimizer()"):
        optimizer = task.optimizer(model)
    with user_code(f"{name}.scheduler()"):
        scheduler = task.scheduler(optimizer, _length(task, data, training))
    model.train()
    batch = move_batch(step[0].batch, "cpu", dtype)
    share = weighted_shares(task, step)[0]
    with use_share(share), user_code(f"{name}.training_step()"):
        loss = task.training_step(model, batch)
    _check_loss(loss, name, finite=share.loss_weight > 0)
    with user_code(f"{name}.training_step()'s backward pass"):
        loss.backward()
    with user_code(f"the step of {name}.optimizer()"):
        optimizer.step()
    for metric in (None, 0.0):
        step_schedule(scheduler, f"{name}.scheduler()", metric)


def _length(task: Task, data: Any, training: TrainingConfig) -> int:
    """The optimizer steps that a schedule is told."""
    per_epoch = open_batches(task, data, BatchPlan(training.global_batch_size)).steps_per_epoch
    return training.steps_over(per_epoch or _ANY_LENGTH) or 0


def _check_loss(loss: Any, name: str, *, finite: bool) -> None:
    where = f"{name}.training_step()"
    if not isinstance(loss, Tensor):
        raise TaskError(f"it gave {type(loss).__name__}", where=where, remedy="return the loss, a tensor of shape []")
    if loss.ndim:
        raise TaskError(
            f"it gave a loss of shape {list(loss.shape)}", where=where, remedy="return the mean, of shape []"
        )
    if not loss.requires_grad:
        remedy = "compute it from the model's output, without detach() or no_grad()"
        raise TaskError("its loss depends on no trainable parameter", where=where, remedy=remedy)
    if finite and not bool(torch.isfinite(loss)):
        remedy = "look at the first samples, the model's weights and the loss"
        raise TaskError(f"the loss of the dense model is {loss.item()}", where=where, remedy=remedy)
