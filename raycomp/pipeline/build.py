"""From a stage's settings to compressors on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raycomp.config import (
    CompressorConfig,
    SelectionEntry,
    SpeedupConfig,
    StageConfig,
    TrainingConfig,
)
from raycomp.config.compressors import PrunerSettings, ScheduleSettings
from raycomp.core.chain import Chain
from raycomp.core.selection import resolve
from raycomp.errors import CompressionError, ConfigError, Problem, RaycompError
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.task import Task
from raycomp.pipeline.user_code import user_code
from raycomp.speedup import align_followers, auto_set_dependency_group_ids

_DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class BuildContext:
    """What compressors are built with beside their own settings.

    Args:
        task: gives the example input, the teacher and how it predicts.
        speedup: whether masks align and depend on each other as the graph says.
        dtype: of the model's and the teacher's weights.
        device: where the example runs.
    """

    task: Task
    speedup: SpeedupConfig
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def example(self) -> Any:
        """The task's example input, on the device and in the dtype of the model."""
        with user_code(f"{type(self.task).__name__}.example_input()"):
            example = self.task.example_input()
        return move_batch(example, self.device, self.dtype)


def weight_dtype(training: TrainingConfig) -> torch.dtype:
    """What the weights are stored in; bf16 computes under autocast with float32 weights."""
    return _DTYPES[training.precision]


def dense_model(task: Task, seed: int) -> nn.Module:
    """The task's model, the same in every process."""
    torch.manual_seed(seed)
    with user_code(f"{type(task).__name__}.model()"):
        model = task.model()
    if not isinstance(model, nn.Module):
        raise RaycompError(f"Task.model() gave {type(model).__name__}", remedy="return a torch.nn.Module")
    return model


def build_chain(model: nn.Module, stage: StageConfig, context: BuildContext, where: str) -> Chain:
    """Fuses a stage's compressors on `model`, the first innermost.

    Raises:
        ConfigError: all that is wrong with any of them, each problem placed below `where`.
    """
    chain = Chain(model)
    problems: list[Problem] = []
    for index, settings in enumerate(stage.compressors):
        place = f"{where}.compressors[{index}]"
        try:
            _build(chain, settings, context, place)
        except ConfigError as error:
            problems += error.problems
        except CompressionError as error:
            problems.append(Problem(place, f"{error.where}: {error.message}", error.remedy or ""))
    if problems:
        raise ConfigError(problems)
    return chain


def _build(chain: Chain, settings: CompressorConfig, context: BuildContext, where: str) -> Any:
    kind = settings.registration.load()
    own = {name: getattr(settings, name) for name in type(settings).model_fields}
    values = {name: value for name, value in own.items() if name not in ("type", "config_list", "pruner")}
    if isinstance(settings, ScheduleSettings):
        return kind(_build(chain, settings.pruner, context, f"{where}.pruner"), **values)
    entries: Sequence[SelectionEntry] = own["config_list"]
    if settings.kind == "distiller":
        values |= {"teacher_model": _teacher(context, where), "teacher_predict": context.task.teacher_predict}
    try:
        resolve(chain.model, settings.kind, entries, "config_list")
        if isinstance(settings, PrunerSettings):
            return kind(chain, _from_graph(chain.model, entries, context), **values)
        return kind(chain, entries, **values)
    except ConfigError as error:
        raise ConfigError(_placed(problem, where) for problem in error.problems) from None


def _placed(problem: Problem, where: str) -> Problem:
    return Problem(f"{where}.{problem.where}", problem.message, problem.remedy)


def _teacher(context: BuildContext, where: str) -> nn.Module:
    with user_code(f"{type(context.task).__name__}.teacher()"):
        teacher = context.task.teacher()
    if teacher is None:
        raise ConfigError([Problem(where, "the task has no teacher", "define teacher(self) in the task")])
    return teacher.to(device=context.device, dtype=context.dtype)


def _from_graph(model: nn.Module, entries: Sequence[SelectionEntry], context: BuildContext) -> list[dict[str, Any]]:
    """The entries with what the graph adds: channels that go together, norms and biases that follow."""
    dicts = [entry.model_dump(by_alias=True) for entry in entries]
    if context.speedup.dependency_groups:
        dicts = auto_set_dependency_group_ids(model, dicts, context.example())
    if context.speedup.align:
        dicts = align_followers(model, dicts, context.example())
    return dicts
