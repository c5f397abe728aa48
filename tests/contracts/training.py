"""A job's stage trained in this process, alone or as one of several gloo ranks, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raycomp.config import JobConfig, parse_job
from raycomp.core.chain import Chain
from raycomp.core.reduction import rank
from raycomp.pipeline.batch_norm import synchronise_batch_norm_
from raycomp.pipeline.checkpoint import StageState
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.stage import StageStart, stage_chain
from raycomp.pipeline.train import StageTraining
from raycomp.report.summary import ProgressEvent
from tests.pipeline.ranks import on_ranks

Values = dict[str, Any]
"""Name → NumPy array: what crosses the border between processes by value."""


@dataclass(frozen=True)
class Trained:
    """What one rank holds after training."""

    masks: Values
    scales: Values
    weights: Values
    metrics: dict[str, float]
    links: list[Any]


class Interrupted(Exception):
    """The end that a test puts to a training."""


@dataclass
class Keeper:
    """An observer that keeps rank 0's last checkpoint in a folder, and ends the training after an epoch."""

    folder: Path | None = None
    end_after: int | None = None

    def progress(self, event: ProgressEvent) -> None:
        """Not looked at."""

    def checkpoint(self, make: Callable[[], StageState], metrics: dict[str, float]) -> None:
        self.metrics = metrics
        state = make()
        if self.folder is not None and rank() == 0:
            state.save(self.folder)
        if self.end_after == state.epoch:
            raise Interrupted


def train(job: Mapping[str, Any] | JobConfig, keeper: Keeper | None = None, resume: Path | None = None) -> Chain:
    """Trains the job's first stage as a worker does; ends quietly where the keeper says so."""
    config = job if isinstance(job, JobConfig) else parse_job(job)
    training = config.training_for(config.stages[0])
    task = build_task(config.task)
    prepare = synchronise_batch_norm_ if training.sync_batch_norm else None
    chain = stage_chain(config, 0, task, StageStart(), prepare=prepare)
    stage = StageTraining(
        name=config.stages[0].name,
        task=task,
        chain=chain,
        training=training,
        evaluation=config.evaluation,
        observer=keeper or Keeper(),
        device=torch.device("cpu"),
    )
    try:
        stage.run(None if resume is None else StageState.load(resume))
    except Interrupted:
        pass
    return chain


def trained(
    rank: int,
    world: int,
    job: Mapping[str, Any],
    folder: Path | None = None,
    end_after: int | None = None,
    resume: Path | None = None,
) -> Trained:
    """`train` on one rank, and what it then holds."""
    keeper = Keeper(folder, end_after)
    links = _watched_links()
    chain = train(job, keeper, resume)
    return Trained(masks_of(chain), scales_of(chain), weights_of(chain), keeper.metrics, links)


def train_on(world: int, job: Mapping[str, Any], *args: Any) -> list[Trained]:
    """The job's first stage on that many gloo ranks; what each of them holds afterwards."""
    return on_ranks(world, trained, job, *args)


def masks_of(chain: Chain) -> Values:
    """module.target → mask."""
    return {f"{name}.{key}": mask.numpy() for name, targets in chain.masks().items() for key, mask in targets.items()}


def scales_of(chain: Chain) -> Values:
    """module.target.field → scale, zero point and the range that they are made from."""
    fields = ("scale", "zero_point", "tracked_min", "tracked_max")
    found = chain.calibration()
    return {
        f"{name}.{key}.{field}": values[field].numpy()
        for name, targets in found.items()
        for key, values in targets.items()
        for field in fields
    }


def weights_of(chain: Chain) -> Values:
    """The model's state dict: parameters, running statistics and what the compressors keep in it."""
    return {name: value.numpy().copy() for name, value in chain.model.state_dict().items()}


def difference(found: Values, expected: Values) -> float:
    """The greatest difference between two sets of values, relative to each one's largest entry."""
    assert found.keys() == expected.keys()
    return max((_relative(found[name], expected[name]) for name in expected), default=0.0)


def same(found: Values, expected: Values) -> bool:
    """Whether two sets of values are the same in every bit."""
    return found.keys() == expected.keys() and all(_same_bits(found[name], expected[name]) for name in expected)


def _relative(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    assert (finite == np.isfinite(found)).all()
    gap = np.abs(found[finite].astype(np.float64) - expected[finite]).max(initial=0.0)
    return float(gap / max(np.abs(expected[finite]).max(initial=0.0), 1e-12))


def _same_bits(found: Any, expected: Any) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
