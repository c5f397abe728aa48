"""How stages train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from raycomp.config.base import Conflict, Given, Settings
from raycomp.config.values import Count, CountOrZero, Flag, Seed, at_most, expects

_Precision = Annotated[Literal["float32", "bf16", "float64"], expects("'float32', 'bf16' or 'float64'")]
_LoaderProcesses = Annotated[CountOrZero, at_most(1000)]


class TrainingConfig(Settings):
    """How a stage trains."""

    global_batch_size: Count = 128
    """Samples of one optimizer step, over all workers."""
    epochs: Count | None = None
    """Passes over the training data; either this or steps."""
    steps: Count | None = None
    """Optimizer steps; either this or epochs."""
    seed: Seed = 0
    """Draws batches, augmentation and initial weights."""
    precision: _Precision = "float32"
    """What the model computes in."""
    gradient_accumulation: Count = 1
    """Micro-batches that a global batch is split into; must divide it."""
    sync_batch_norm: Flag = False
    """Whether batch norms take their statistics over all workers."""
    checkpoint_every_epochs: Count = 1
    """Epochs between two checkpoints."""
    num_data_workers: _LoaderProcesses = 0
    """Processes that load data, per worker."""

    def steps_over(self, steps_per_epoch: int | None) -> int | None:
        """The optimizer steps of a training; None where it counts epochs of data that can't tell their length."""
        if self.steps is not None or steps_per_epoch is None:
            return self.steps
        return (self.epochs or 1) * steps_per_epoch

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.has("epochs") and given.has("steps"):
            yield Conflict(("steps",), "epochs and steps exclude each other", "leave one of them out")
        if not given.has("epochs") and not given.has("steps"):
            yield Conflict((), "it does not say how long to train", "add epochs or steps")
        yield from accumulation_conflicts(given)


def accumulation_conflicts(given: Given) -> Iterator[Conflict]:
    """Whether a global batch splits into micro-batches; also asked of a job's training under a stage's overrides."""
    size, parts = given.number("global_batch_size") or 128, given.number("gradient_accumulation") or 1
    if parts >= 1 and size % parts:
        yield Conflict(
            ("gradient_accumulation",),
            f"a global batch of {size} samples does not split into {parts} equal micro-batches",
            f"gradient_accumulation should divide {size}",
        )


class TrainingOverrides(Settings):
    """What a stage trains differently; a key left out is as in the job's training."""

    global_batch_size: Count | None = None
    """Samples of one optimizer step, over all workers."""
    epochs: Count | None = None
    """Passes over the training data; takes the place of the job's steps."""
    steps: Count | None = None
    """Optimizer steps; takes the place of the job's epochs."""
    seed: Seed | None = None
    """Draws batches, augmentation and initial weights."""
    precision: _Precision | None = None
    """What the model computes in."""
    gradient_accumulation: Count | None = None
    """Micro-batches that a global batch is split into; must divide it."""
    sync_batch_norm: Flag | None = None
    """Whether batch norms take their statistics over all workers."""
    checkpoint_every_epochs: Count | None = None
    """Epochs between two checkpoints."""
    num_data_workers: _LoaderProcesses | None = None
    """Processes that load data, per worker."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.has("epochs") and given.has("steps"):
            yield Conflict(("steps",), "epochs and steps exclude each other", "leave one of them out")

    def over(self, training: TrainingConfig) -> TrainingConfig:
        """The job's training with what this stage says in its place."""
        values = {key: getattr(training, key) for key in TrainingConfig.model_fields}
        given = {key: value for key, value in self if value is not None}
        if "epochs" in given or "steps" in given:
            values |= {"epochs": None, "steps": None}
        return TrainingConfig(**(values | given))
