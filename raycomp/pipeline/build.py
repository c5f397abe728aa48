"""From a stage's settings to compressors on a model.

What a config list means for a model (selection, groups, align) is resolved once per stage, on the driver or the head
node; every worker builds its compressors from the same frozen description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from raycomp.config import CompressorSettings, Need, SelectionEntry, SpeedupConfig, StageConfig, TrainingConfig
from raycomp.config.compressors import AroundSettings, PrunerSettings, SearchSettings
from raycomp.config.loader import parse_config_list
from raycomp.core.chain import Chain
from raycomp.core.compressor import Compressor
from raycomp.core.kept_masks import KeptMasks
from raycomp.core.masks import Masks
from raycomp.core.moments import Calibration, Moments
from raycomp.core.selection import Selection, resolve
from raycomp.distillation.teacher import Predict
from raycomp.errors import CompressionError, ConfigError, Problem, RaycompError
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.task import Task, given
from raycomp.pipeline.user_code import user_code
from raycomp.pruning.pruner import Pruner
from raycomp.quantization.quantizer import Quantizer
from raycomp.speedup import complete_config_list

_DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class ResolvedStage:
    """A stage's config lists, resolved against the model that it starts from.

    Args:
        selections: one for each compressor, in their order; that of its pruner for a schedule.
    """

    selections: tuple[Selection, ...]


@dataclass(frozen=True)
class BuildContext:
    """What compressors are built with beside their own settings.

    Args:
        task: gives the example input, the teacher and how it predicts.
        speedup: whether masks align and depend on each other as the graph says.
        dtype: of the model's and the teacher's weights.
        device: where the example runs.
        seed: of what compressors draw.
    """

    task: Task
    speedup: SpeedupConfig
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    @cached_property
    def example(self) -> Any:
        """The task's example input, on the device and in the dtype of the model."""
        return move_batch(given(self.task, "example_input", self.seed), self.device, self.dtype)

    @cached_property
    def teacher(self) -> nn.Module | None:
        """The task's teacher, the same one for all distillers."""
        teacher = given(self.task, "teacher", self.seed)
        return None if teacher is None else teacher.to(device=self.device, dtype=self.dtype)

    @cached_property
    def teacher_predict(self) -> Predict:
        """The task's `teacher_predict`, one function for all distillers."""

        def predict(batch: Any, teacher: nn.Module) -> Any:
            with user_code(f"{type(self.task).__name__}.teacher_predict()"):
                return self.task.teacher_predict(batch, teacher)

        return predict


def weight_dtype(training: TrainingConfig) -> torch.dtype:
    """What the weights are stored in; bf16 computes under autocast with float32 weights."""
    return _DTYPES[training.precision]


def recast(model: nn.Module, training: TrainingConfig) -> tuple[str, ...]:
    """What to say where a model's weights are not what they train in and are published as."""
    ours = str(weight_dtype(training)).removeprefix("torch.")
    theirs = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if theirs <= {ours, "float32"}:  # who asked for more than float32 knows
        return ()
    remedy = "; training.precision: float64 keeps it" if "float64" in theirs else ""
    return (f"the model is in {', '.join(sorted(theirs))}, and trains and is published in {ours}{remedy}",)


def dense_model(task: Task, seed: int) -> nn.Module:
    """The task's model, the same in every process."""
    model = given(task, "model", seed)
    if not isinstance(model, nn.Module):
        raise RaycompError(f"Task.model() gave {type(model).__name__}", remedy="return a torch.nn.Module")
    # Hugging Face's models say which loss they bring.
    # Encoder-decoders name it, too, and bring one of their own that doesn't shift.
    loss_fn, config = getattr(model, "loss_function", None), getattr(model, "config", None)
    causal = getattr(loss_fn, "__name__", None) == "ForCausalLMLoss"
    task.shifts_labels = task.shifts_labels or (causal and not getattr(config, "is_encoder_decoder", False))
    return model


def resolve_stage(model: nn.Module, stage: StageConfig, context: BuildContext, where: str) -> ResolvedStage:
    """What a stage's config lists mean for the model that it starts from.

    Raises:
        ConfigError: all that is wrong with any of them, each problem placed below `where`.
        SpeedupError: the model can't be traced.
    """
    problems: list[Problem] = []
    selections = _selections(model, stage, context, where, problems)
    if problems:
        raise ConfigError(problems)
    return ResolvedStage(tuple(selections.values()))


def build_chain(
    model: nn.Module,
    stage: StageConfig,
    resolved: ResolvedStage,
    context: BuildContext,
    where: str,
    kept: Masks | None = None,
) -> Chain:
    """Fuses a stage's compressors on `model`, the first innermost, behind the masks that it brings along.

    Raises:
        ConfigError: all that is wrong with any of them, each problem placed below `where`.
    """
    problems: list[Problem] = []
    chain = Chain(model, context.example, context.seed)
    if kept:
        KeptMasks(chain, kept)
    _fuse(chain, stage, dict(enumerate(resolved.selections)), context, where, problems)
    if problems:
        raise ConfigError(problems)
    return chain


def try_stage(
    model: nn.Module, stage: StageConfig, context: BuildContext, where: str, problems: list[Problem]
) -> tuple[ResolvedStage, Chain]:
    """Resolves, builds and rehearses a stage as far as that goes, and adds to `problems` what is wrong with it.

    What it returns is whole where no problem was added.
    """
    selections = _selections(model, stage, context, where, problems)
    chain = Chain(model, context.example, context.seed)
    members = _fuse(chain, stage, selections, context, where, problems)
    for path, member in sorted(members.items(), key=lambda item: item[1].turn):
        with _below(path, problems):
            member.rehearse()
    return ResolvedStage(tuple(selections.values())), chain


def _selections(
    model: nn.Module, stage: StageConfig, context: BuildContext, where: str, problems: list[Problem]
) -> dict[int, Selection]:
    """What each compressor's config list means; those that are wrong are left out."""
    found = {}
    for index, settings in enumerate(stage.compressors):
        path, holder = _holder(settings, f"{where}.compressors[{index}]")
        with _below(path, problems):
            found[index] = _resolved(model, holder, context)
    return found


def _fuse(
    chain: Chain,
    stage: StageConfig,
    selections: Mapping[int, Selection],
    context: BuildContext,
    where: str,
    problems: list[Problem],
) -> dict[str, Moments]:
    """Builds the compressors; those that stand on the model then, by the key path of their config lists' holder."""
    members: dict[str, Moments] = {}
    for index, selection in selections.items():
        path = f"{where}.compressors[{index}]"
        with _below(path, problems):
            _build(chain, stage.compressors[index], selection, context)
            members[_holder(stage.compressors[index], path)[0]] = chain.members[-1]
    return members


def _holder(settings: CompressorSettings, path: str) -> tuple[str, CompressorSettings]:
    """Which settings hold the config list, and their key path: those of the pruner inside."""
    return (f"{path}.pruner", settings.pruner) if isinstance(settings, AroundSettings) else (path, settings)


def _resolved(model: nn.Module, settings: CompressorSettings, context: BuildContext) -> Selection:
    entries: Sequence[SelectionEntry] = settings.config_list  # type: ignore[attr-defined]
    # First as the user wrote it, so that errors name his entries.
    resolve(model, settings.kind, entries, "config_list")
    kind = settings.registration.load()
    if isinstance(settings, PrunerSettings):
        # With what the graph adds: channels that go together, norms and biases that follow.
        given = [entry.model_dump() for entry in entries]
        groups, align = context.speedup.dependency_groups, context.speedup.align
        completed = complete_config_list(
            model, given, context.example, groups=groups, align=align, default=kind.granularity_under(settings)
        )
        entries = parse_config_list("pruner", completed)
    found = resolve(model, settings.kind, entries, "config_list", context.example)
    selection: Selection = kind.completed(model, found, context.example)
    return selection


def _build(chain: Chain, settings: CompressorSettings, selection: Selection, context: BuildContext) -> Any:
    kind = settings.registration.load()
    own = {name: getattr(settings, name) for name in type(settings).model_fields}
    values = {name: value for name, value in own.items() if name not in ("type", "config_list", "pruner")}
    if isinstance(settings, SearchSettings):
        # What it found is in the selection, or yet to be found: the pruner alone stands on the model.
        return _build(chain, settings.pruner, selection, context)
    if isinstance(settings, AroundSettings):
        return kind(_build(chain, settings.pruner, selection, context), **values)
    if Need.TEACHER in settings.registration.needs:
        if context.teacher is None:
            raise CompressionError("the task has no teacher", remedy="define teacher(self) in the task")
        values |= {"teacher_model": context.teacher, "teacher_predict": context.teacher_predict}
    return kind(chain, selection, **values)


def pruner_at(chain: Chain, place: int) -> Pruner:
    """The pruner that stands for the compressor at a place of a stage: itself, or the one inside."""
    found = [member for member in chain.members if isinstance(member, Compressor)][place]
    assert isinstance(found, Pruner)
    return found


def blank_calibration(chain: Chain) -> Calibration:
    """The form of all quantizers' calibration, before there are ranges: with scales of 1."""
    found = Calibration()
    for member in chain.members:
        for module, targets in member.blank_calibration().items() if isinstance(member, Quantizer) else ():
            found.setdefault(module, {}).update(targets)
    return found


@contextmanager
def _below(path: str, problems: list[Problem]) -> Iterator[None]:
    """Gathers what is wrong within the block, as problems at that key path."""
    try:
        yield
    except ConfigError as error:
        problems += [Problem(f"{path}.{found.where}", found.message, found.remedy) for found in error.problems]
    except CompressionError as error:
        message = f"{error.where}: {error.message}" if error.where else error.message
        problems.append(Problem(path, message, error.remedy or ""))
