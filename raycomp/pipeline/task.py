"""What a user writes: a model, its data, and what differs from the usual way of training it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate

from raycomp.core.seeds import restored_generators, seed_everything
from raycomp.errors import TaskError
from raycomp.pipeline.data import structure
from raycomp.pipeline.data.batches import first_batch, is_map_style
from raycomp.pipeline.data.plan import TorchBatches
from raycomp.pipeline.earlier import keep, stand_in
from raycomp.pipeline.user_code import user_code

LABEL_KEYS = ("labels", "label", "target", "targets")
_LABELS_OF_HEADS = ("start_positions", "end_positions", "next_sentence_label", "class_labels", "label_ids")


class Task:
    """A model and how it is trained and judged. Subclass it; `model`, `train_data` and `eval_data` are required.

    A job's `task.arguments` are the constructor's keyword arguments. Every worker constructs the task for itself and
    must get the same; what is costly to make (a trained teacher) is made once in `prepare`.

    Batches may have any form. The defaults know `(input, ..., target)` and mappings with a key `labels`, `label`,
    `target` or `targets`, and models that give logits, or an output with `loss` and `logits` as Hugging Face's do.
    """

    prepared: Path | None = None
    """The folder that `prepare` filled; set before anything else is called on a worker."""

    unused_parameters: bool = False
    """Whether a training step may leave parameters without a gradient; DDP then looks for them, which costs time."""

    ignore_index: int = -100
    """The label that the loss passes over."""

    shifts_labels: bool = False
    """Whether the loss holds each position against the label of the next, so that a sample's first label is in no loss.
    Set by itself where the model is a causal language model of Hugging Face's."""

    def prepare(self, folder: Path) -> None:
        """Writes files that every worker needs; runs once per job, on the driver. Default: nothing.

        The files are shipped to each worker; `prepared_file(name)` gives their place there.
        """

    def prepared_file(self, name: str) -> Path:
        """The place of a file that `prepare` wrote.

        Raises:
            TaskError: `prepare` has not run, or wrote no such file.
        """
        if self.prepared is None or not (self.prepared / name).is_file():
            raise TaskError(
                f"{name!r} has not been prepared",
                where=type(self).__name__,
                remedy="a job prepares its task by itself; elsewhere call prepare_task(task, folder) first",
            )
        return self.prepared / name

    def model(self) -> nn.Module:
        """The model to compress, with its dense weights."""
        raise self._required("model")

    def train_data(self) -> Any:
        """What the model trains on.

        Returns:
            A map-style Dataset (raycomp batches, shuffles and shares it out), an iterable Dataset, a function of
            `LoaderContext` that gives an iterable of batches, or a `ray.data.Dataset`.
        """
        raise self._required("train_data")

    def eval_data(self) -> Any:
        """What the model is judged on, in any form that `train_data` may have."""
        raise self._required("eval_data")

    def teacher(self) -> nn.Module | None:
        """The trained model that distillers hold the student against. Default: None."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """A batch of samples. Default: torch's `default_collate`."""
        return default_collate(samples)

    def augment(self, sample: Any, generator: Generator) -> Any:
        """A training sample, changed at random. Default: unchanged.

        Args:
            sample: what the dataset gave.
            generator: seeded by the job's seed, the epoch and the sample, so the same on any number of workers.
        """
        return sample

    def count_samples(self, batch: Any) -> int:
        """The number of samples in a batch. Default: the leading size of its first tensor."""
        return structure.count_samples(batch)

    def loss_items(self, batch: Any) -> float:
        """How many items a batch's loss is the mean of. Ranks weigh by them, so that it becomes the global batch's.

        Default: integer labels other than `ignore_index`, one for each sample or each position; samples where labels
        are anything else; without labels the positions of `attention_mask`, else samples. Any number that is
        proportional to what the loss divides by will do (a sum of class weights).
        """
        labels = self._labels(batch)
        if isinstance(labels, Tensor) and labels.ndim and _are_integers(labels):
            counted = labels[:, 1:] if self.shifts_labels and labels.ndim > 1 else labels
            return int((counted != self.ignore_index).sum())
        positions = self.attention_mask(batch) if labels is None else None
        return self.count_samples(batch) if positions is None else int(positions.sum())

    def attention_mask(self, batch: Any) -> Tensor | None:
        """Which positions of the samples' sequences count, bool, [n, length]; None where there is no padding.

        Ranges, statistics and distances of outputs [n, length, ...] pass over the others. Default: a mapping's
        `attention_mask`.
        """
        found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return found.bool() if isinstance(found, Tensor) and found.ndim == 2 else None

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments without the target, positional and by name.

        Default: all but the last of a tuple or list of several, all but the label of a mapping, else the batch itself.
        """
        if isinstance(batch, Mapping):
            return (), {key: value for key, value in batch.items() if key not in LABEL_KEYS}
        if isinstance(batch, tuple | list):
            return tuple(batch[:-1] if len(batch) > 1 else batch), {}
        return (batch,), {}

    def target(self, batch: Any) -> Any:
        """What the model should say. Default: the last of a tuple or list, the label of a mapping."""
        if isinstance(batch, Mapping):
            key = _label_key(batch)
            if key is not None:
                return batch[key]
        elif isinstance(batch, tuple | list) and len(batch) > 1:
            return batch[-1]
        raise self._undefined("target", f"finds no target in a batch of type {type(batch).__name__}")

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for a batch. Default: `model(*args, **kwargs)` of `inputs`.

        A mapping's label goes along where the model's forward has an argument of that name.
        """
        args, kwargs = self.inputs(batch)
        key = _label_key(batch) if isinstance(batch, Mapping) else None
        if key is not None and key not in kwargs and _has_argument(model, key):
            kwargs = {**kwargs, key: batch[key]}
        return model(*args, **kwargs)

    def loss(self, output: Any, batch: Any) -> Tensor:
        """The mean loss over the batch's samples, of shape [].

        Default: the output's own `loss`, else cross entropy of logits [n, classes, ...] against integers [n, ...].
        """
        own = _part(output, "loss")
        if isinstance(own, Tensor):
            return own
        logits, target = _logits(output), self.target(batch)
        if not _fits_classes(logits, target):
            raise self._undefined("loss", "knows classification alone: logits [n, classes, ...] and integer targets")
        return F.cross_entropy(logits, target, ignore_index=self.ignore_index)

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, of shape []. Default: `loss(forward(model, batch), batch)`."""
        return self.loss(self.forward(model, batch), batch)

    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]:
        """Each metric's value for every sample, of shape [n]; the mean over all samples of all workers is reported.

        The first one is the job's main metric. Default: accuracy of logits [n, classes] against integers [n].
        """
        logits, target = _logits(output), self.target(batch)
        if not _fits_classes(logits, target) or logits.ndim != 2:
            raise self._undefined("metrics", "knows accuracy alone: logits [n, classes] and integer targets [n]")
        return {"accuracy": (logits.argmax(dim=1) == target).double()}

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of the model's parameters. Default: AdamW with learning rate 1e-3."""
        return AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1e-3)

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
        """A learning-rate schedule, stepped after every optimizer step. Default: none.

        `ReduceLROnPlateau` is stepped after every epoch, with the main metric: of an accuracy, give it `mode="max"`.
        """
        return None

    def example_input(self) -> Tensor | tuple[Any, ...] | dict[str, Any]:
        """Inputs to trace the model with: one tensor, positional arguments, or arguments by name; batch size 2 or more.

        Default: `inputs` of the first two training samples.
        """
        args, kwargs = self.inputs(first_batch(self, given_data(self, "train"), 2))
        if args and kwargs:
            raise self._undefined("example_input", "can't hold both positional and named inputs")
        if kwargs:
            return kwargs
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args

    def teacher_predict(self, batch: Any, teacher: nn.Module) -> Any:
        """The teacher's output for a batch. Default: `forward(teacher, batch)`."""
        return self.forward(teacher, batch)

    def overrides(self, method: str) -> bool:
        """Whether the task's class brings its own `method`."""
        return getattr(type(self), method) is not getattr(Task, method)

    def _labels(self, batch: Any) -> Any:
        """What the loss is held against, None where a batch has nothing of the kind."""
        try:
            return self.target(batch)
        except TaskError:
            others = (batch[key] for key in _LABELS_OF_HEADS if key in batch) if isinstance(batch, Mapping) else ()
            return next(iter(tuple(found) for found in others), None)

    def _required(self, method: str) -> TaskError:
        return TaskError(f"the task has no {method}()", where=type(self).__name__, remedy=f"define {method}(self)")

    def _undefined(self, method: str, why: str) -> TaskError:
        return TaskError(
            f"the default {method}() {why}", where=type(self).__name__, remedy=f"define {method} in the task"
        )


_kept: ContextVar[dict[tuple[int, str], tuple[Task, Any]] | None] = ContextVar("_kept", default=None)


def given(task: Task, method: str, seed: int = 0) -> Any:
    """What a method of the task's without arguments gives, the same in every process: what it draws from the global
    generators is seeded.

    After the training, what it gave before stands in where it raises.

    Raises:
        TaskError: it raised.
    """
    try:
        with restored_generators(), user_code(f"{type(task).__name__}.{method}()"):
            seed_everything(seed)
            found = getattr(task, method)()
    except TaskError as error:
        return stand_in(method, seed, error)
    keep(method, seed, found)
    return found


def given_data(task: Task, split: str) -> Any:
    """What `train_data` or `eval_data` gives.

    What they draw is the same wherever they are called, for any stage and seed of the job: a sample that is drawn for
    the evaluation is in it from the first epoch to the report, and in no stage's training data.

    Args:
        task: the user's, prepared.
        split: "train" or "eval".

    Raises:
        TaskError: it raised.
    """
    kept, key = _kept.get(), (id(task), split)
    if kept is not None and key in kept:
        return kept[key][1]
    data = given(task, f"{split}_data")
    if kept is not None and (is_map_style(data) or isinstance(data, TorchBatches)):
        kept[key] = task, data  # the task stays alive, so that no other gets its id
    return data


@contextmanager
def data_made_once() -> Iterator[None]:
    """Within the block, data that can be read any number of times are made once: to make them may take long."""
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def prepare_task(task: Task, folder: Path) -> None:
    """Runs `task.prepare` in `folder`, which is made, and lets the task use what it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    with restored_generators(), user_code(f"{type(task).__name__}.prepare()"):
        seed_everything(0)
        task.prepare(folder)
    let_use(task, folder)


def let_use(task: Task, prepared: Path | None) -> None:
    """Lets a task use the folder that `prepare` filled, where it has run; also one that is a frozen dataclass."""
    object.__setattr__(task, "prepared", prepared)


def _label_key(batch: Mapping[str, Any]) -> str | None:
    return next((key for key in LABEL_KEYS if key in batch), None)


def _has_argument(model: nn.Module, name: str) -> bool:
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return name in inspect.signature(plain.forward).parameters


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _logits(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    named = _part(output, "logits")
    if named is None and isinstance(output, tuple | list) and output:
        return output[0]
    return named


def _fits_classes(logits: Any, target: Any) -> bool:
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor) or logits.ndim < 2:
        return False
    return _are_integers(target) and logits.shape[:1] + logits.shape[2:] == target.shape


def _are_integers(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
