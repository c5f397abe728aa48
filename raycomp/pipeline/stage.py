"""From a stage's committed checkpoint to the model that the next stage starts from."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from raycomp.config import JobConfig
from raycomp.core.attach import without_quantizers
from raycomp.core.chain import Chain
from raycomp.core.masks import Masks
from raycomp.core.moments import Calibration
from raycomp.pipeline.build import BuildContext, ResolvedStage, build_chain, dense_model, resolve_stage, weight_dtype
from raycomp.pipeline.inputs import differing_inputs, real_inputs
from raycomp.pipeline.masks_file import load_masks, save_masks
from raycomp.pipeline.notes import Notes
from raycomp.pipeline.task import Task
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.results.summary import Unpruned, Verification
from raycomp.speedup import (
    ModelSpeedup,
    Plan,
    UnprunedWarning,
    apply_plan,
    cut_calibration,
    draws,
    remaining_masks,
    verify,
    with_value_masks,
)
from raycomp.storage import load_tensors, save_tensors

_PLAN, _MODEL, _KEPT = "plan.json", "model.safetensors", "kept_masks.safetensors"


@dataclass(frozen=True)
class StageStart:
    """Where a stage starts.

    Args:
        plan: all surgery of the stages before it.
        weights: the state dict that they left; None for the task's dense model.
        kept: masks of theirs that were not cut, in the coordinates of the model.
    """

    plan: Plan = field(default_factory=Plan)
    weights: Mapping[str, Tensor] | None = None
    kept: Masks = field(default_factory=Masks)

    def model(self, task: Task, seed: int) -> nn.Module:
        """The model, of the user's own class, in the dtype of the weights."""
        model = apply_plan(dense_model(task, seed), self.plan)
        if self.weights is not None:
            model.to(next(iter(value.dtype for value in self.weights.values() if value.is_floating_point())))
            model.load_state_dict(self.weights)
        return model

    def save(self, folder: Path) -> None:
        """Writes plan, weights and masks; weights must be there."""
        assert self.weights is not None
        save_tensors(folder / _MODEL, self.weights)
        save_masks(folder / _KEPT, self.kept)
        (folder / _PLAN).write_text(self.plan.to_json())

    @classmethod
    def load(cls, folder: Path) -> StageStart:
        """Reads what `save` wrote."""
        plan = Plan.from_json((folder / _PLAN).read_text())
        return cls(plan, load_tensors(folder / _MODEL), load_masks(folder / _KEPT))


@dataclass(frozen=True)
class StageResult:
    """What a stage gave.

    Args:
        simulated: the model under masks and fake quantization, in eval mode.
        under_masks: the same without fake quantization, whose function speedup keeps.
        masked: the plain model with its masks committed, before speedup.
        model: the plain model after speedup, in eval mode; the masked one where nothing was cut.
        masks: of the model before speedup, those that it brought along included.
        kept: those of them that hold for `model`.
        calibration: of the model after it.
        folds: the module groups that the quantizer ran as one operator.
        plan: all surgery from the dense model to `model`.
        verification: `model` against the masked model; None where no speedup was made.
        unpruned: what is masked and stayed.
        notes: what the report should say.
    """

    simulated: nn.Module
    under_masks: nn.Module
    masked: nn.Module
    model: nn.Module
    masks: Masks
    kept: Masks
    calibration: Calibration
    folds: list[tuple[str, ...]]
    plan: Plan
    verification: Verification | None
    unpruned: tuple[Unpruned, ...]
    notes: tuple[str, ...]

    def next_start(self) -> StageStart:
        """Where the next stage starts."""
        return StageStart(self.plan, dict(self.model.state_dict()), self.kept)


def stage_context(job: JobConfig, index: int, task: Task, device: torch.device | None = None) -> BuildContext:
    """What a stage's compressors are built with."""
    training = job.training_for(job.stages[index])
    return BuildContext(task, job.speedup, weight_dtype(training), device or torch.device("cpu"), training.seed)


def resolve_start(job: JobConfig, index: int, task: Task, start: StageStart) -> ResolvedStage:
    """What a stage's config lists mean for the model that it starts from; errors as in `resolve_stage`."""
    context = stage_context(job, index, task)
    model = start.model(task, context.seed).to(dtype=context.dtype)
    return resolve_stage(model, job.stages[index], context, f"stages[{index}]")


def stage_chain(
    job: JobConfig,
    index: int,
    task: Task,
    start: StageStart,
    resolved: ResolvedStage,
    device: torch.device | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
) -> Chain:
    """A stage's compressors on the model that it starts from; the same on every worker and on the driver.

    Args:
        job: the job.
        index: the stage's.
        task: the user's.
        start: what the stages before left.
        resolved: what the stage's config lists mean for that model.
        device: where to put the model; default the CPU.
        prepare: changes the model in place before the compressors are attached.
    """
    context = stage_context(job, index, task, device)
    model = start.model(task, context.seed).to(device=context.device, dtype=context.dtype)
    if prepare is not None:
        prepare(model)
    return build_chain(model, job.stages[index], resolved, context, f"stages[{index}]", start.kept)


def finish_stage(
    job: JobConfig, index: int, task: Task, start: StageStart, resolved: ResolvedStage, state: StageState
) -> StageResult:
    """Rebuilds the trained model from its checkpoint, collects masks and calibration, and cuts what is masked.

    A sped-up model that fails its verification is dropped for the masked one, and the notes say so. Masks that are not
    cut go on into the next stage; those on inputs and outputs stay on the last stage's model.
    """
    chain = stage_chain(job, index, task, start, resolved)
    chain.model.load_state_dict(state.model)
    chain.load_state_dict(state.training["chain"])
    chain.model.eval()
    masks, calibration, folds = chain.masks(), chain.calibration(), chain.folds()
    simulated, under_masks = copy.deepcopy(chain.model), without_quantizers(chain.model)
    chain.unwrap()
    masked = chain.model
    uncut = StageResult(
        simulated=simulated,
        under_masks=under_masks,
        masked=masked,
        model=masked,
        masks=masks,
        kept=masks,
        calibration=calibration,
        folds=folds,
        plan=start.plan,
        verification=None,
        unpruned=(),
        notes=state.notes,
    )
    if index == len(job.stages) - 1:
        uncut = _with_masks_on(uncut)
    if not (masks and job.speedup.enabled and job.stages[index].speedup):
        return uncut
    notes = Notes(*uncut.notes)
    # A training is not lost to a model that can't be cut, whatever the reason: the masked one goes on.
    with notes.instead_of(f"stage {job.stages[index].name}: nothing was cut"):
        return _cut(job, index, task, start.plan, uncut)
    return replace(uncut, notes=notes())


def _cut(job: JobConfig, index: int, task: Task, before: Plan, uncut: StageResult) -> StageResult:
    """The stage's result with what is masked cut out; the one without, if the cut model isn't the masked one."""
    context = stage_context(job, index, task)
    others = differing_inputs(task, context.dtype)
    speedup = ModelSpeedup(uncut.masked, context.example, uncut.masks, exact=job.speedup.exact, others=others)
    with warnings.catch_warnings():
        # The report names what stays.
        warnings.simplefilter("ignore", UnprunedWarning)
        smaller = speedup.speedup_model().eval()
    inputs = [real_inputs(task, context.dtype), *others]
    verification = verify(uncut.under_masks, smaller, inputs, job.speedup.tolerance)
    tried = replace(uncut, verification=verification, unpruned=speedup.unpruned)
    if job.speedup.exact and not verification.passed:
        note = (
            f"stage {job.stages[index].name}: the sped-up model differed from the masked one by "
            f"{verification.relative:.2e} of its range (tolerance {verification.tolerance:g}), so nothing was cut"
            + (
                "; its forward gives other outputs each time, in evaluation, too"
                if draws(uncut.under_masks, inputs[0])
                else ""
            )
        )
        return replace(tried, notes=(*uncut.notes, note))
    return replace(
        tried,
        model=smaller,
        kept=remaining_masks(uncut.masks, speedup.plan),
        calibration=cut_calibration(uncut.calibration, speedup.plan),
        plan=before.then(speedup.plan),
        notes=(*uncut.notes, *_lost_arguments(uncut.masked, smaller, job.stages[index].name)),
    )


def _lost_arguments(before: nn.Module, after: nn.Module, stage: str) -> tuple[str, ...]:
    """What to say of arguments that a rewritten forward no longer takes."""
    taken = inspect.signature(after.forward).parameters
    lost = [name for name in inspect.signature(before.forward).parameters if name not in taken]
    if not lost:
        return ()
    shown = ", ".join(lost[:5]) + (", …" if len(lost) > 5 else "")
    return (f"stage {stage}: the forward states sizes as constants and was rewritten; it no longer takes {shown}",)


def _with_masks_on(uncut: StageResult) -> StageResult:
    """The result whose model masks its inputs and outputs by itself, as the simulation did."""
    notes = Notes(*uncut.notes)
    with notes.instead_of("masks of inputs and outputs are not on the model"):
        model, plan = with_value_masks(uncut.masked, uncut.masks)
        return replace(uncut, model=model.eval(), plan=uncut.plan.then(plan))
    return replace(uncut, notes=notes())
