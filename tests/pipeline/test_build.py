"""A stage's config lists are resolved once; who builds compressors from that asks nothing of the model again."""

from __future__ import annotations

import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch

from raycomp.config import parse_job
from raycomp.core.moments import Moments, RunContext
from raycomp.core.target import TargetId
from raycomp.errors import ConfigError
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.preflight import check_stages
from raycomp.pipeline.stage import StageStart, resolve_start, stage_chain
from tests.contracts import tiny
from tests.contracts.training import train
from tests.pipeline.ranks import on_ranks

JOB = tiny.job(tiny.pruner("L1NormPruner"), tiny.quantizer(2), tiny.distiller(), steps=4)


def test_a_worker_parses_and_traces_nothing() -> None:
    config = parse_job(JOB)
    task = build_task(config.task)
    resolved = pickle.loads(pickle.dumps(check_stages(config, task).first))
    assert resolved == resolve_start(config, 0, task, StageStart())

    def asked(*args: Any, **options: Any) -> None:
        raise AssertionError("resolved again")

    with patch("raycomp.pipeline.build.complete_config_list", asked), patch("raycomp.core.selection.layouts", asked):
        chain = stage_chain(config, 0, task, StageStart(), resolved)
    # What the graph adds is in it: the norm behind a pruned layer follows.
    assert TargetId("bn1", "weight") in chain.space.targets
    assert resolved.selections[0].layouts[TargetId("conv1", "weight")].shape == (6, 6, 3, 3)
    assert resolved.selections[1].layouts[TargetId("fc", "_input_0")].shape == (2, 6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [
                {"op_names": ["conv1"], "sparse_ratio": 0.5, "dependency_group_id": "a"},
                {"op_names": ["fc"], "sparse_ratio": 0.5, "dependency_group_id": "a"},
            ],
            "share a dependency group, but have",
        ),
        (
            [
                {"op_names": ["conv1"], "sparse_ratio": 0.5, "global_group_id": "a"},
                {"op_names": ["conv2"], "sparse_ratio": 0.25, "global_group_id": "a"},
            ],
            "one equal sparse_ratio",
        ),
    ],
)
def test_what_no_decision_can_do_is_told_before_training(entries: list[dict[str, Any]], message: str) -> None:
    config = parse_job(tiny.job({"type": "TaylorPruner", "config_list": entries, "training_steps": 4}))
    with pytest.raises(ConfigError, match=message) as raised:
        check_stages(config, build_task(config.task))
    assert [problem.where for problem in raised.value.problems] == ["stages[0].compressors[0].config_list"]


class Probe(Moments):
    """Keeps what a run gives."""

    def __init__(self, chain: Any) -> None:
        self.chain = chain
        self.contexts: list[RunContext] = []
        self.metrics: list[float] = []
        chain.members.append(self)

    def begin_run(self, context: RunContext) -> None:
        assert context.evaluate is not None
        self.contexts.append(context)
        self.metrics.append(context.evaluate())


def test_a_run_gives_compressors_what_they_need() -> None:
    first, second = on_ranks(2, _probed)
    assert first == second
    assert first[0] == (4, 4, 4)


def _probed(rank: int, world: int) -> tuple[tuple[int | None, ...], float, list[float]]:
    probes = []

    def probed(*args: Any, **options: Any) -> Any:
        chain = stage_chain(*args, **options)
        probes.append(Probe(chain))
        return chain

    with patch("tests.contracts.training.stage_chain", probed):
        chain = train(tiny.job(tiny.pruner("L1NormPruner"), steps=4))
    (context,) = probes[0].contexts
    assert isinstance(context.optimizers[0], torch.optim.SGD)
    assert len(context.schedulers) == 1
    assert context.example.shape == (2, 1, 6, 6)
    found = (context.steps_per_epoch, context.total_steps, chain.step)
    return found, probes[0].metrics[0], torch.rand(3, generator=chain.generator).tolist()
