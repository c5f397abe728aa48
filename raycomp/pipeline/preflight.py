"""What can be known to be wrong before any cluster time is spent: the task, and the config lists against its model."""

from __future__ import annotations

from collections.abc import Sequence

from raycomp.config import JobConfig, StageConfig
from raycomp.errors import ConfigError, Problem, SpeedupError
from raycomp.pipeline.build import Settling, build_chain, dense_model
from raycomp.pipeline.task import Task


def check_stages(job: JobConfig, task: Task) -> None:
    """Builds every stage's compressors on the task's model and throws them away.

    A later stage's names are looked up in the dense model: speedup keeps modules and their names.

    Raises:
        ConfigError: everything that is wrong, each with its key's path.
        TaskError: the task's own code raised.
    """
    problems = list(_order_problems(job.stages))
    for index, stage in enumerate(job.stages):
        model = dense_model(task, job.training_for(stage).seed)
        try:
            build_chain(model, stage, Settling(task, job.speedup), f"stages[{index}]")
        except ConfigError as error:
            problems += error.problems
        except SpeedupError as error:
            problems.append(Problem(f"stages[{index}]", str(error), "turn speedup.align and dependency_groups off"))
    if problems:
        raise ConfigError(problems)


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
