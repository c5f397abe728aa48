"""The end of a run on the head node: from the last stage's checkpoint to the files of the artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycomp.config import JobConfig
from raycomp.core.attach import share_of_parameters
from raycomp.core.masks import Masks
from raycomp.core.moments import Calibration
from raycomp.core.target import TargetId, target_kind
from raycomp.deploy.int8 import Int8Model, lower_int8, simulate_int8
from raycomp.pipeline.build import ResolvedStage, dense_model, recast, weight_dtype
from raycomp.pipeline.earlier import standing_in
from raycomp.pipeline.ending import artifact, figures
from raycomp.pipeline.ending.outcome import StageOutcome
from raycomp.pipeline.inputs import differing_inputs, real_inputs
from raycomp.pipeline.notes import Notes
from raycomp.pipeline.stage import StageResult, StageStart, finish_stage
from raycomp.pipeline.task import Task, given
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.report.text import layers_by_cause
from raycomp.results.summary import (
    Int8Figures,
    LayerFigures,
    ModelFigures,
    RunSummary,
    SearchFigures,
    Simulation,
    Unpruned,
    Verification,
)
from raycomp.speedup import Plan, restored_mask

_SHOWN = 4


@dataclass(frozen=True)
class RunFacts:
    """What the report says of the run itself.

    Args:
        run: its id.
        created: UTC time, ISO 8601.
        artifact_uri: where the artifact will be.
        environment: the cluster.
        timings: part → seconds, so far.
        searches: what was searched for.
    """

    run: str
    created: str
    artifact_uri: str
    environment: dict[str, str]
    timings: dict[str, float]
    searches: tuple[SearchFigures, ...] = ()


@dataclass(frozen=True)
class Conclusion:
    """What the driver hands to its user."""

    summary: RunSummary
    masks: Masks
    calibration: Calibration


class Stopwatch:
    """Adds up how long the parts of a run take."""

    def __init__(self, timings: dict[str, float] | None = None) -> None:
        self.timings: dict[str, float] = dict(timings or {})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times the block as a part of that name."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.monotonic() - begun


def conclude(
    job: JobConfig,
    task: Task,
    start: StageStart,
    resolved: ResolvedStage,
    state: StageState,
    earlier: Sequence[tuple[StageOutcome, Masks, Plan]],
    facts: RunFacts,
    folder: Path,
) -> Conclusion:
    """Finishes the last stage, lowers, measures, and writes the artifact's files into `folder`.

    Args:
        job: the job.
        task: the user's.
        start: where the last stage started.
        resolved: what its config lists mean for the model there.
        state: its committed checkpoint.
        earlier: the outcomes and masks of the stages before it, and the surgery done before each.
        facts: what the report says of the run.
        folder: an empty folder.

    Whatever fails here is a note of the summary: a training is never lost to its ending.
    """
    with standing_in() as told:
        return _concluded(job, task, start, resolved, state, earlier, facts, folder, told)


def _concluded(
    job: JobConfig,
    task: Task,
    start: StageStart,
    resolved: ResolvedStage,
    state: StageState,
    earlier: Sequence[tuple[StageOutcome, Masks, Plan]],
    facts: RunFacts,
    folder: Path,
    told: Sequence[str],
) -> Conclusion:
    watch = Stopwatch(facts.timings)
    torch.set_num_threads(job.scaling.threads_per_worker)
    with watch.part("speed up and verify"):
        result = finish_stage(job, len(job.stages) - 1, task, start, resolved, state)
    outcomes = [*(outcome for outcome, _, _ in earlier), StageOutcome.of(result, state)]
    notes = Notes(*(note for outcome in outcomes for note in outcome.notes))
    masks = result.masks
    with notes.instead_of("masks.safetensors holds the masks of the last stage alone"):
        masks = dense_masks([*((found, plan) for _, found, plan in earlier), (result.masks, start.plan)])
    dense = _dense(job, task, notes)
    example, *others = _inputs(task, job.training.seed, notes)
    int8 = None
    if job.wants_int8:
        with watch.part("lower to int8"):
            int8 = _lowered(job, result, example, others, notes)
    with watch.part("write the artifact"):
        artifact.write_models(folder, result, int8, example, others, notes)
        with notes.instead_of("masks or calibration are not written"):
            artifact.write_statistics(folder, masks, result)
    with watch.part("measure"):
        forms = _forms(dense, result, int8, notes)
        rows, timed_how = figures.model_figures(job, task, forms, example, folder / artifact.ONNX, notes)
        simulation, int8_row = _held_against(job, task, forms, rows, notes)
    layers: tuple[LayerFigures, ...] = ()
    with notes.instead_of("the layers are not listed"):
        layers = figures.layer_figures(dense, masks, result)
    unpruned = _last_of_each(outcomes)
    with notes.instead_of("what is masked and was not cut is not listed"):
        notes.say(*_left_in_place(dense, masks, unpruned))
    environment = dict(facts.environment)
    with notes.instead_of("the environment is not told"):
        environment = {**figures.environment(), **environment}
    summary = RunSummary(
        job=job.name,
        run=facts.run,
        created=facts.created,
        models=rows,
        verification=_with_metric(result.verification, rows, job),
        earlier=tuple(outcome.verification for outcome, _, _ in earlier if outcome.verification is not None),
        simulation=simulation,
        int8=int8_row,
        layers=layers,
        unpruned=unpruned,
        history=tuple(event for outcome in outcomes for event in outcome.history),
        timings=watch.timings,
        environment={**environment, "latencies": timed_how},
        config_yaml=job.to_yaml(),
        artifact_uri=facts.artifact_uri,
        runs_alone=(folder / artifact.PROGRAM).exists(),
        searches=facts.searches,
    )
    notes.say(*told)
    return Conclusion(artifact.write_summary(folder, summary, notes), masks, result.calibration)


def _dense(job: JobConfig, task: Task, notes: Notes) -> nn.Module:
    """The model as it was; where its weights were wider than what is published, as wide: that is no compression."""
    training = job.training_for(job.stages[-1])
    model, dtype = dense_model(task, job.training.seed).eval(), weight_dtype(training)
    notes.say(*recast(model, training))
    wider = any(each.is_floating_point() and each.itemsize > dtype.itemsize for each in model.parameters())
    return model.to(dtype=dtype) if wider else model


def _inputs(task: Task, seed: int, notes: Notes) -> tuple[Any, ...]:
    """What the models are exported for and measured with: an input, and others where sizes differ."""
    with notes.instead_of("the sizes that real batches have are not known"):
        differing = differing_inputs(task, torch.float32)
        if differing:
            return differing
    with notes.instead_of("the evaluation data can't be read, and the models are exported for the example input"):
        return (real_inputs(task, torch.float32, 2),)
    return (given(task, "example_input", seed),)


def _forms(dense: nn.Module, result: StageResult, int8: Int8Model | None, notes: Notes) -> figures.Forms:
    if not result.calibration:
        return figures.Forms(dense, None, result.simulated, result.masked, result.model, None, int8)
    on_grids = None
    with notes.instead_of("there is no sped-up model with simulated quantization"):
        on_grids = simulate_int8(result.model, result.calibration, result.folds)
    return figures.Forms(dense, result.under_masks, result.simulated, result.masked, result.model, on_grids, int8)


def _held_against(
    job: JobConfig, task: Task, forms: figures.Forms, rows: Sequence[ModelFigures], notes: Notes
) -> tuple[Simulation | None, Int8Figures | None]:
    """The forms that round, each against the one whose function it should have."""
    simulation, int8 = None, None
    given: figures.Outputs = {}
    if forms.sped_up_simulated is not None or forms.int8 is not None:
        with notes.instead_of("no form that rounds is compared with another"):
            given = figures.outputs(job, task, forms)
    if given:
        with notes.instead_of("the sped-up model is not compared with simulated quantization"):
            simulation = figures.simulation(forms, given, rows)
    if given and forms.int8 is not None:
        with notes.instead_of("int8 is not compared with the simulated quantization"):
            int8 = figures.int8_figures(forms, given, forms.int8, rows)
    return simulation, int8


def _with_metric(found: Verification | None, rows: Sequence[ModelFigures], job: JobConfig) -> Verification | None:
    """The last stage's verification, by the words of the forms that are shown."""
    if found is None:
        return None
    reference = "masked" if any(row.name == "masked" for row in rows) else "simulated"
    difference = figures.metric_difference("sped-up", reference, rows)
    stage = job.stages[-1].name if len(job.stages) > 1 else ""
    return replace(found, reference=reference, metric_difference=difference, stage=stage)


def _left_in_place(dense: nn.Module, masks: Masks, unpruned: Sequence[Unpruned]) -> list[str]:
    """What is masked and was not cut, by its reason, with the part of the dense model's parameters that has masks."""
    by_reason: dict[str, list[str]] = {}
    for item in unpruned:
        by_reason.setdefault(item.reason, []).append(item.module)
    told = []
    for reason, found in by_reason.items():
        names = list(dict.fromkeys(found))
        targets = [TargetId(name, target) for name in names for target in masks.get(name, ())]
        part = share_of_parameters(dense, [each for each in targets if target_kind(each.target) == "parameter"])
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        told.append(f"masked and not cut: {shown} ({part:.0%} of the parameters): {reason}")
    return told


def _last_of_each(outcomes: Sequence[StageOutcome]) -> tuple[Unpruned, ...]:
    """What stayed masked, as the last stage that names it says."""
    found = {(item.module, item.dim): item for outcome in outcomes for item in outcome.unpruned}
    return tuple(found.values())


def _lowered(
    job: JobConfig, result: StageResult, example: Any, others: Sequence[Any], notes: Notes
) -> Int8Model | None:
    """The int8 model, None where the model can't be lowered."""
    wanted = job.int8.reduce_range
    reduce_range = None if wanted == "auto" else bool(wanted)
    with notes.instead_of("there is no int8 model"):
        int8 = lower_int8(
            result.model, result.calibration, result.folds, example, others=others, reduce_range=reduce_range
        )
        if len(int8.float_causes) < len(int8.layers):  # else it is said first of all
            notes.say(*(f"int8 computes in float {each}" for each in layers_by_cause(int8.float_causes)))
        if int8.grown_scales:
            notes.say(f"the scale of {', '.join(int8.grown_scales)} had to grow so that the bias fits into int32")
        return int8
    return None


def dense_masks(parts: Sequence[tuple[Masks, Plan]]) -> Masks:
    """The masks of all stages in the dense model's coordinates: what an earlier stage cut is masked.

    Args:
        parts: each stage's masks, with the surgery that was done before it.
    """
    merged = Masks()
    for masks, plan in parts:
        for target_id, mask in masks.by_target():
            merged.put(target_id, restored_mask(mask, str(target_id), plan), masks.method(*target_id))
    return merged
