"""A job is never lost: what goes on from a checkpoint ends as what was never disturbed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from raycomp.errors import ArtifactError
from raycomp.pipeline.training.checkpoint import StageState
from tests.contracts import tiny
from tests.contracts.training import Keeper, Trained, assert_close, assert_same, differing, trained
from tests.pipeline.ranks import on_ranks

# 4 steps an epoch. Masks are decided at steps 3, 6, 9 and 12, so that an interruption falls between two decisions, with
# saliencies half summed up, and before, at and after the start of quantization.
_FUSED = (tiny.scheduled_pruner(3, 4), tiny.quantizer(7), tiny.distiller())
FLOAT32 = tiny.job(*_FUSED, arguments={"dropout": 0.3}, steps=18)
FLOAT64 = tiny.job(*_FUSED, steps=18, precision="float64")
OWN_NORMS = tiny.job(*_FUSED, arguments={"dropout": 0.3}, steps=18, sync_batch_norm=False, gradient_accumulation=2)


def test_training_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    undisturbed = trained(FLOAT32)
    assert all(mask.mean() == 0.5 for mask in undisturbed.masks.values())
    for epoch in (1, 2, 4):
        folder = tmp_path / str(epoch)
        begun = trained(FLOAT32, Keeper(folder, end_after=epoch))
        assert differing(begun.weights, undisturbed.weights)
        assert_same(trained(FLOAT32, resume=folder), undisturbed)


def test_a_checkpoint_holds_the_progress_so_far(tmp_path: Path) -> None:
    trained(FLOAT32, Keeper(tmp_path / "first", end_after=2))
    state = StageState.load(tmp_path / "first")
    assert (state.stage, state.epoch, state.step) == ("fused", 2, 8)
    trained(FLOAT32, Keeper(tmp_path / "second"), resume=tmp_path / "first")
    ended = StageState.load(tmp_path / "second")
    assert [event.epoch for event in ended.history] == [1, 2, 3, 4, 5]
    assert [event.step for event in ended.history] == [4, 8, 12, 16, 18]
    assert {(event.epochs, event.steps) for event in ended.history} == {(5, 18)}
    assert ended.history[:2] == state.history


def test_a_finished_stage_stays_as_it_is(tmp_path: Path) -> None:
    ended = trained(FLOAT32, Keeper(tmp_path))
    again = trained(FLOAT32, Keeper(metrics=ended.metrics), resume=tmp_path)
    assert_same(again, ended)


def test_elapsed_time_goes_on_where_the_checkpoint_ended(tmp_path: Path) -> None:
    """Whoever goes on with a run began later than it."""
    trained(FLOAT32, Keeper(tmp_path / "first", end_after=2))
    state = StageState.load(tmp_path / "first")
    state = replace(state, history=tuple(replace(event, elapsed_s=1000.0) for event in state.history))
    state.save(tmp_path / "first")
    trained(FLOAT32, Keeper(tmp_path / "second"), resume=tmp_path / "first")
    elapsed = [event.elapsed_s for event in StageState.load(tmp_path / "second").history]
    assert elapsed == sorted(elapsed) and elapsed[2] >= 1000.0


def test_what_a_checkpoint_has_to_say_is_in_the_next_one(tmp_path: Path) -> None:
    trained(FLOAT32, Keeper(tmp_path / "first", end_after=2))
    replace(StageState.load(tmp_path / "first"), notes=("told",)).save(tmp_path / "first")
    trained(FLOAT32, Keeper(tmp_path / "second"), resume=tmp_path / "first")
    assert "told" in StageState.load(tmp_path / "second").notes


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a stage's checkpoint"):
        StageState.load(tmp_path)
    (tmp_path / "progress.json").write_text('{"format": 99}')
    with pytest.raises(ArtifactError, match="format is 99"):
        StageState.load(tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_as_many_workers_go_on_to_the_same_bits(tmp_path: Path, world: int) -> None:
    for ranks in on_ranks(world, _interrupted_and_not, {"synchronised": FLOAT32, "own norms": OWN_NORMS}, tmp_path):
        for undisturbed, resumed in ranks.values():
            assert_same(resumed, undisturbed)


def test_other_numbers_of_workers_go_on_to_the_same_in_float64(tmp_path: Path) -> None:
    undisturbed = trained(FLOAT64)
    on_ranks(2, _interrupted, FLOAT64, tmp_path)
    for world in (1, 4):
        assert_close(on_ranks(world, _resumed, FLOAT64, tmp_path)[-1], undisturbed)


def _interrupted(rank: int, world: int, job: dict[str, Any], folder: Path) -> None:
    trained(job, Keeper(folder, end_after=2))


def _resumed(rank: int, world: int, job: dict[str, Any], folder: Path) -> Trained:
    return trained(job, resume=folder)


def _interrupted_and_not(
    rank: int, world: int, jobs: dict[str, dict[str, Any]], folder: Path
) -> dict[str, tuple[Trained, Trained]]:
    found = {}
    for name, job in jobs.items():
        undisturbed = trained(job)
        _interrupted(rank, world, job, folder / name)
        dist.barrier()
        found[name] = undisturbed, _resumed(rank, world, job, folder / name)
    return found
