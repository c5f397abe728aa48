"""What can be known to be wrong before any cluster time is spent: the task, and the config lists against its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from raycomp.config import COMPRESSORS, JobConfig, StageConfig, TaskConfig, TrainingConfig, parse_config_list
from raycomp.config.compressors import AroundSettings, PrunerSettings
from raycomp.core.attach import share_of_parameters
from raycomp.core.chain import Chain
from raycomp.core.layout import Layout, traced_shapes
from raycomp.core.masks import Masks
from raycomp.core.selection import resolve
from raycomp.core.target import TargetId, target_kind
from raycomp.deploy.int8 import foreseen_hindrances
from raycomp.errors import ConfigError, Problem, RaycompError, SpeedupError
from raycomp.pipeline.build import (
    BuildContext,
    ResolvedStage,
    blank_calibration,
    dense_model,
    pruner_at,
    recast,
    try_stage,
)
from raycomp.pipeline.data.batches import open_batches
from raycomp.pipeline.data.plan import BatchPlan
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.notes import Notes
from raycomp.pipeline.rehearsal import rehearse_task
from raycomp.pipeline.search import searches
from raycomp.pipeline.stage import stage_context
from raycomp.pipeline.task import Task, data_made_once, given_data, prepare_task
from raycomp.pipeline.training.loop import endless
from raycomp.pipeline.user_code import user_code
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.search.space import SearchSpace
from raycomp.report.text import layers_by_cause
from raycomp.speedup import obstacles


@dataclass(frozen=True)
class Checked:
    """What is known of a job that can run.

    Args:
        first: what the first stage's config lists mean for the model.
        warnings: what its user should know before it runs.
        metrics: the names of the task's metrics; none where only a cluster could tell.
    """

    first: ResolvedStage
    warnings: tuple[str, ...]
    metrics: tuple[str, ...] = ()


def check_stages(job: JobConfig, task: Task) -> Checked:
    """Lets the task take a step on two samples, builds every stage's compressors on its model, lets them decide once,
    and throws all away.

    A later stage's names are looked up in the dense model: speedup keeps modules and their names.

    Raises:
        ConfigError: everything that is wrong, each with its key's path.
        TaskError: the task's own code raised.
    """
    with data_made_once():
        return _check_stages(job, task)


def _check_stages(job: JobConfig, task: Task) -> Checked:
    problems = list(_order_problems(job.stages))
    resolved, warnings, earlier, trains = [], list[str](), Masks(), False
    for index, stage in enumerate(job.stages):
        steps = _steps(task, job.training_for(stage))
        problems += _length_problems(stage, index, steps)
        try:
            context = stage_context(job, index, task)
            model = dense_model(task, context.seed)
            warnings += recast(model, job.training_for(stage))
            model = model.to(dtype=context.dtype)
            cuts = job.speedup.enabled and stage.speedup
            uncut = _obstacles(model, stage, context) if cuts and job.speedup.exact else {}
            made, chain = try_stage(model, stage, context, f"stages[{index}]", problems)
            warnings += [*_what_stays(stage, chain, uncut), *(_no_channels(stage, chain) if cuts else ())]
            resolved.append(made)
            trains |= chain.wants_training
            if steps is None and chain.wants_training and not any(each.where == "training.epochs" for each in problems):
                problems.append(endless("training"))
            problems += _method_problems(earlier, chain, index)
            problems += [] if problems else _search_problems(stage, chain, index)
            with chain.space.as_written(), user_code(f"{type(task).__name__}.optimizer()"):
                task.optimizer(chain.model)
            problems += _unseen_problems(chain, index)
            if job.wants_int8 and index == len(job.stages) - 1 and not problems:
                warnings += _computed_in_float(task, chain, context)
        except ConfigError as error:
            problems += error.problems
        except SpeedupError as error:
            problems.append(
                Problem(
                    f"stages[{index}]",
                    str(error),
                    "set speedup.enabled, align and dependency_groups to false: the masked model is published",
                )
            )
    if problems:
        raise ConfigError(problems)
    training = job.training_for(job.stages[0])
    samples = -(-training.global_batch_size // (training.gradient_accumulation * job.scaling.num_workers))
    metrics = rehearse_task(task, training, trains=trains, samples=samples)
    return Checked(resolved[0], tuple(dict.fromkeys(warnings)), metrics)


def _method_problems(earlier: Masks, chain: Chain, index: int) -> Iterator[Problem]:
    """What a stage masks in another way than a stage before it, whose masks may go on into it."""
    found = chain.masks()
    for target_id, _ in found.by_target():
        ours, theirs = found.method(*target_id), earlier.method(*target_id)
        if target_id.target in earlier.get(target_id.module, {}) and ours != theirs:
            message = f"{target_id} is masked by '{ours}', and by '{theirs}' in a stage before"
            yield Problem(f"stages[{index}]", message, "mask it in one way")
        earlier.put(target_id, torch.ones(()), ours)


def _search_problems(stage: StageConfig, chain: Chain, index: int) -> Iterator[Problem]:
    """Goals that a search can't share out over the layers."""
    for place in searches(stage):
        try:
            SearchSpace(pruner_at(chain, place))
        except ConfigError as error:
            where = f"stages[{index}].compressors[{place}].pruner"
            yield from (Problem(f"{where}.{each.where}", each.message, each.remedy) for each in error.problems)


def _obstacles(model: nn.Module, stage: StageConfig, context: BuildContext) -> dict[tuple[str, ...], str]:
    """Layers that can't be cut, and why."""
    found: dict[tuple[str, ...], str] = {}
    for settings in stage.compressors:
        holder = settings.pruner if isinstance(settings, AroundSettings) else settings
        if not isinstance(holder, PrunerSettings):
            continue
        try:
            resolve(model, "pruner", holder.config_list, "config_list")
        except ConfigError:
            continue
        given = [entry.model_dump(by_alias=True) for entry in holder.config_list]
        found |= obstacles(model, given, context.example)
    return found


def _what_stays(stage: StageConfig, chain: Chain, found: Mapping[tuple[str, ...], str]) -> list[str]:
    """Layers that will be masked and can't be cut, each with what part of the model's parameters will be masked so."""
    masked = [key for pruner in _pruners(chain) for key in pruner.selected if pruner.layouts[key].is_parameter]
    told = []
    for names, reason in found.items():
        part = share_of_parameters(chain.model, [key for key in masked if key.module in names])
        told.append(
            f"stage {stage.name}: {', '.join(names)} ({part:.0%} of the parameters) will be masked and can't be cut: "
            f"{reason}"
        )
    return told


def _no_channels(stage: StageConfig, chain: Chain) -> list[str]:
    """What will be masked in other pieces than a layer's channels, of which speedup makes nothing smaller."""
    found: dict[str, list[TargetId]] = {}
    for pruner in _pruners(chain):
        for target_id in pruner.goals:
            if not pruner.layouts[target_id].is_parameter:
                continue
            if target_id.target not in ("weight", "bias"):
                found.setdefault("raycomp cuts no other parameters than weight and bias", []).append(target_id)
            elif not _in_channels(pruner.grid(target_id), pruner.layouts[target_id]):
                found.setdefault("its granularity is finer than channels", []).append(target_id)
    told = []
    for reason, targets in found.items():
        part = share_of_parameters(chain.model, targets)
        names = ", ".join(map(str, targets))
        told.append(
            f"stage {stage.name}: {names} ({part:.0%} of the parameters) will be masked and not be cut: {reason}"
        )
    return told


def _in_channels(grid: Sequence[int], layout: Layout) -> bool:
    """Whether blocks are whole slices of one dimension; those of a transposed weight's groups are of its second."""
    by_group = layout.groups > 1 and grid[0] == layout.groups
    return sum(count > 1 for count in grid[by_group:]) <= 1


def _pruners(chain: Chain) -> list[Pruner]:
    return [member for member in chain.members if isinstance(member, Pruner)]


def _computed_in_float(task: Task, chain: Chain, context: BuildContext) -> tuple[str, ...]:
    """What of the int8 model will not be computed in integers, or why there will be none; of the dense model's form."""
    notes, calibration = Notes(), blank_calibration(chain)
    with notes.instead_of("there will be no int8 model"):
        found = foreseen_hindrances(dense_model(task, context.seed), calibration, chain.folds(), context.example)
        notes.say(*(f"int8 will compute in float {each}" for each in layers_by_cause(found)))
        weights = {module for module, targets in calibration.items() if "parameter" in map(target_kind, targets)}
        if not weights - found.keys():
            lack = "" if weights else ": no weight is quantized; add `weight` to target_names"
            notes.say(f"the int8 model will compute nothing with integers{lack}")
    return notes()


def _order_problems(stages: Sequence[StageConfig]) -> list[Problem]:
    """A quantizer's ranges hold for the weights that it trained, so nothing may train after it."""
    problems = []
    for index, stage in enumerate(stages[:-1]):
        for position, settings in enumerate(stage.compressors):
            if settings.kind == "quantizer":
                message = f"{settings.type} stands in stage {stage.name!r}, and the later stages change what it learned"
                where = f"stages[{index}].compressors[{position}].type"
                problems.append(Problem(where, message, "quantize in the last stage"))
    return problems


def _unseen_problems(chain: Chain, index: int) -> list[Problem]:
    """Inputs and outputs that the model's modules don't have: nothing would happen there, and nobody would be told."""
    waiting = [key for key, target in chain.space.targets.items() if target.kind != "parameter"]
    with user_code("the model's forward on Task.example_input()"):
        seen = traced_shapes(chain.model, waiting, chain.example)
    message = "a forward pass of the example input doesn't reach this target"
    remedy = "name an input or output that the module has, of a module that runs"
    return [Problem(f"stages[{index}]", f"{key}: {message}", remedy) for key in waiting if key not in seen]


def _steps(task: Task, training: TrainingConfig) -> int | None:
    """The optimizer steps of a training, where they can be told without reading the data."""
    if training.steps is not None:
        return training.steps
    data = given_data(task, "train")
    with user_code(f"{type(task).__name__}.train_data()"):
        per_epoch = open_batches(task, data, BatchPlan(training.global_batch_size)).steps_per_epoch
    return training.steps_over(per_epoch)


def _length_problems(stage: StageConfig, index: int, steps: int | None) -> Iterator[Problem]:
    """A schedule or a start that the training ends before would leave the model half compressed."""
    for position, settings in enumerate(stage.compressors):
        if steps is not None and settings.least_steps > steps:
            message = f"{settings.type} needs {settings.least_steps} optimizer steps, the stage trains {steps}"
            where = f"stages[{index}].compressors[{position}]"
            yield Problem(where, message, "train longer, or let it decide earlier")


def selection_problems(raw: Mapping[str, Any], base_dir: Path) -> list[Problem]:
    """What is wrong with the config lists of a job whose other keys are wrong already, so that all is told at once.

    Entries that are themselves wrong are passed over, and so is everything where the task can't be built.

    Args:
        raw: the job file's content.
        base_dir: what the task's path is relative to.
    """
    try:
        with TemporaryDirectory() as folder:
            task = build_task(TaskConfig(**raw["task"]), base_dir)
            prepare_task(task, Path(folder))
            model = dense_model(task, 0)
    except (RaycompError, KeyError, TypeError):
        return []
    return [problem for path, kind, entry in _raw_entries(raw) for problem in _unselected(model, path, kind, entry)]


def _raw_entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each config-list entry with its key path and kind, as far as the file has the form of a job."""
    for index, stage in enumerate(_sequence(raw, "stages")):
        for position, settings in enumerate(_sequence(stage, "compressors")):
            path = f"stages[{index}].compressors[{position}]"
            nested = settings.get("pruner") if isinstance(settings, Mapping) else None
            if isinstance(nested, Mapping):
                settings, path = nested, f"{path}.pruner"
            known = COMPRESSORS.get(str(settings.get("type"))) if isinstance(settings, Mapping) else None
            for number, entry in enumerate(_sequence(settings, "config_list") if known else ()):
                yield f"{path}.config_list[{number}]", known.kind if known else None, entry


def _unselected(model: nn.Module, path: str, kind: Any, entry: Any) -> list[Problem]:
    try:
        entries = parse_config_list(kind, [entry])
    except ConfigError:
        return []
    try:
        resolve(model, kind, entries, "config_list")
    except ConfigError as error:
        return [
            Problem(path + item.where.removeprefix("config_list[0]"), item.message, item.remedy)
            for item in error.problems
        ]
    return []


def _sequence(value: Any, key: str) -> Sequence[Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, list | tuple) else ()
