"""Stages that prune in turns: each turn becomes a stage of its own, behind which what it masked is cut out."""

from __future__ import annotations

from collections.abc import Iterator

from raycomp.config.compressors import AutoCompressPrunerConfig
from raycomp.config.job import JobConfig, StageConfig


def in_turns(job: JobConfig) -> JobConfig:
    """The job with a stage for every turn of an `AutoCompressPruner`; quantizers stand in the last turn alone."""
    stages = tuple(turn for stage in job.stages for turn in _turns(stage, cut=job.speedup.enabled and stage.speedup))
    return job if stages == job.stages else job.model_copy(update={"stages": stages})


def _turns(stage: StageConfig, *, cut: bool) -> Iterator[StageConfig]:
    searching = [each for each in stage.compressors if isinstance(each, AutoCompressPrunerConfig)]
    if not searching:
        yield stage
        return
    turns = searching[0].total_iteration
    for number in range(turns):
        last = number == turns - 1
        compressors = tuple(
            each.turn(number, cut=cut) if isinstance(each, AutoCompressPrunerConfig) else each
            for each in stage.compressors
            if last or each.kind != "quantizer"
        )
        yield stage.model_copy(update={"name": f"{stage.name}-{number + 1}", "compressors": compressors})
