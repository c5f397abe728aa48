"""A job's stage trained in this process, alone or as one of several gloo ranks, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from raycomp.config import JobConfig, parse_job
from raycomp.core.batch_share import is_idle
from raycomp.core.chain import Chain
from raycomp.core.reduction import rank
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.stage import StageResult, StageStart, finish_stage, resolve_start, stage_chain
from raycomp.pipeline.task import Task
from raycomp.pipeline.training.batch_norm import synchronise_batch_norm_
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.training.loop import StageTraining
from raycomp.results.progress import ProgressEvent
from tests.pipeline.ranks import on_ranks

Values = dict[str, Any]
"""Name → NumPy array: what crosses the border between processes by value."""


class LinkChoice(NamedTuple):
    """Which of its links a distilled target was held against, and which this rank's own samples speak for."""

    target: str
    taken: int
    own: int
    idle: bool


@dataclass(frozen=True)
class Trained:
    """What one rank holds after training."""

    masks: Values
    scales: Values
    weights: Values
    metrics: dict[str, float]
    links: list[LinkChoice]


class Interrupted(Exception):
    """The end that a test puts to a training."""


@dataclass
class Keeper:
    """An listener that keeps rank 0's last checkpoint in a folder, and ends the training after an epoch."""

    folder: Path | None = None
    end_after: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def progress(self, event: ProgressEvent) -> None:
        """Not looked at."""

    def checkpoint(self, make: Callable[[], StageState], metrics: dict[str, float]) -> None:
        self.metrics = metrics
        state = make()
        if self.folder is not None and rank() == 0:
            state.save(self.folder)
        if self.end_after == state.epoch:
            raise Interrupted


def train(
    job: Mapping[str, Any] | JobConfig,
    keeper: Keeper | None = None,
    resume: Path | None = None,
    index: int = 0,
    start: StageStart | None = None,
) -> Chain:
    """Trains a stage of the job as a worker does; ends quietly where the keeper says so."""
    config = job if isinstance(job, JobConfig) else parse_job(job)
    training = config.training_for(config.stages[index])
    task = build_task(config.task)
    prepare = synchronise_batch_norm_ if training.sync_batch_norm else None
    start = start or StageStart()
    resolved = resolve_start(config, index, task, start)
    chain = stage_chain(config, index, task, start, resolved, prepare=prepare)
    stage = StageTraining(
        name=config.stages[index].name,
        task=task,
        chain=chain,
        training=training,
        evaluation=config.evaluation,
        listener=keeper or Keeper(),
        device=torch.device("cpu"),
    )
    with suppress(Interrupted):
        stage.run(None if resume is None else StageState.load(resume))
    return chain


def chain_of(config: JobConfig, index: int = 0, task: Task | None = None, start: StageStart | None = None) -> Chain:
    """A stage's compressors on the model that it starts from."""
    task, start = task or build_task(config.task), start or StageStart()
    return stage_chain(config, index, task, start, resolve_start(config, index, task, start))


def finish(job: Mapping[str, Any], folder: Path, index: int = 0, start: StageStart | None = None) -> StageResult:
    """What the head node makes of a stage's checkpoint."""
    config, start = parse_job(job), start or StageStart()
    task = build_task(config.task)
    resolved = resolve_start(config, index, task, start)
    return finish_stage(config, index, task, start, resolved, StageState.load(folder))


def trained(job: Mapping[str, Any], keeper: Keeper | None = None, resume: Path | None = None) -> Trained:
    """`train`, and what this rank then holds."""
    keeper = keeper or Keeper()
    with _watched_links() as links:
        chain = train(job, keeper, resume)
    return Trained(masks_of(chain), scales_of(chain), weights_of(chain), keeper.metrics, links)


def train_on(world: int, jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Trained]]:
    """Each job's first stage on that many gloo ranks; what each of them holds afterwards."""
    ranks = on_ranks(world, _train_all, jobs)
    return {name: [found[name] for found in ranks] for name in jobs}


def _train_all(rank: int, world: int, jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Trained]:
    return {name: trained(job) for name, job in jobs.items()}


@contextmanager
def _watched_links() -> Iterator[list[LinkChoice]]:
    """What every dynamic distiller takes as the nearest link, and what this rank alone would have taken."""
    seen: list[LinkChoice] = []
    combine = DynamicLayerwiseDistiller.combine

    def watched(self: DynamicLayerwiseDistiller, distances: dict[Any, list[Tensor]]) -> dict[Any, Tensor]:
        chosen = combine(self, distances)
        for key, links in distances.items():
            taken = next(index for index, link in enumerate(links) if link is chosen[key])
            seen.append(LinkChoice(str(key), taken, int(torch.stack(links).argmin()), is_idle()))
        return chosen

    with patch.object(DynamicLayerwiseDistiller, "combine", watched):
        yield seen


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


def differing(found: Values, expected: Values) -> list[str]:
    """The names of the values that are not the same in every bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not _same_bits(found[name], expected[name])]


def assert_same(found: Trained, expected: Trained) -> None:
    """Every rank's masks, scales, weights and decisions are the same in every bit."""
    assert differing(found.masks, expected.masks) == []
    assert differing(found.scales, expected.scales) == []
    assert differing(found.weights, expected.weights) == []
    assert found.metrics == expected.metrics


def assert_close(found: Trained, expected: Trained) -> None:
    """Masks are the same, scales and weights to 1e-9."""
    assert differing(found.masks, expected.masks) == []
    assert difference(found.scales, expected.scales) <= 1e-9
    assert difference(found.weights, expected.weights) <= 1e-9


def _relative(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    assert (finite == np.isfinite(found)).all()
    gap = np.abs(found[finite].astype(np.float64) - expected[finite]).max(initial=0.0)
    return float(gap / max(np.abs(expected[finite]).max(initial=0.0), 1e-12))


def _same_bits(found: Any, expected: Any) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
