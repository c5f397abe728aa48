"""What of a run is found again in storage, whole or damaged, by the same job or another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomp.config import parse_job
from raycomp.distributed.run_store import RunRecord, RunStore, job_uri, unfinished_run
from raycomp.errors import ArtifactError
from raycomp.pipeline.training.checkpoint import StageState
from tests.contracts import tiny

_FILES = ("model.safetensors", "state.safetensors", "progress.json")


def _flip(path: Path) -> None:
    """One bit, in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "other": lambda path: path.write_text("[]"),
}


def _state(epoch: int) -> StageState:
    weights = {"fc.weight": torch.full((4, 4), float(epoch))}
    return StageState("prune", epoch, 4 * epoch, weights, {"optimizer": {"exp_avg": torch.ones(8)}}, (), ("its note",))


@pytest.fixture
def run_store(tmp_path: Path) -> RunStore:
    """A run whose stage has checkpoints of the epochs 1 and 2."""
    store = RunStore(str(tmp_path), "run")
    for epoch in (1, 2):
        folder = tmp_path / "train" / "run" / "prune" / f"checkpoint_2026-11-25_06-39-0{epoch}.123456"
        folder.mkdir(parents=True)
        _state(epoch).save(folder)
    return store


def test_training_goes_on_from_the_newest_checkpoint(run_store: RunStore) -> None:
    state, damaged = run_store.last_state("prune")
    assert state is not None and (state.epoch, state.notes, damaged) == (2, ("its note",), ())
    assert torch.equal(state.model["fc.weight"], torch.full((4, 4), 2.0))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", _FILES)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_taken_and_told(
    run_store: RunStore, tmp_path: Path, file: str, damage: str
) -> None:
    newest = max((tmp_path / "train" / "run" / "prune").iterdir())
    DAMAGES[damage](newest / file)
    state, damaged = run_store.last_state("prune")
    assert state is not None and state.epoch == 1
    (note,) = damaged
    assert state.notes == ("its note", note)
    assert newest.name in note and file in note and "passed over" in note


def test_the_furthest_checkpoint_counts_not_the_one_with_the_latest_time(run_store: RunStore, tmp_path: Path) -> None:
    """Of a run that goes on where the clock is behind, the end of the training would be lost, and not be missed."""
    folder = tmp_path / "train" / "run" / "prune" / "checkpoint_2026-11-24_06-39-00.123456"
    folder.mkdir()
    _state(3).save(folder)
    state, damaged = run_store.last_state("prune")
    assert state is not None and (state.epoch, damaged) == (3, ())


def _saved(folder: Path, *epochs: int) -> None:
    for epoch in epochs:
        (folder / f"checkpoint_{epoch}").mkdir(parents=True)
        _state(epoch).save(folder / f"checkpoint_{epoch}")


def test_checkpoints_that_a_resumed_run_supersedes_are_removed(tmp_path: Path) -> None:
    """Those of two runs before it, of which Ray knows nothing."""
    folder = tmp_path / "train" / "run" / "prune"
    _saved(folder, 3, 4, 7, 8, 9, 10)
    RunStore(str(tmp_path), "run").forget_superseded("prune")
    assert {path.name for path in folder.iterdir()} == {"checkpoint_9", "checkpoint_10"}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", _FILES)
def test_the_only_good_checkpoint_is_never_removed(tmp_path: Path, file: str, damage: str) -> None:
    folder, run_store = tmp_path / "train" / "run" / "prune", RunStore(str(tmp_path), "run")
    _saved(folder, 1, 2, 3, 4)
    for epoch in (2, 3, 4):
        DAMAGES[damage](folder / f"checkpoint_{epoch}" / file)
    run_store.forget_superseded("prune")
    state, _ = run_store.last_state("prune")
    assert state is not None and state.epoch == 1


@pytest.fixture
def uploaded(tmp_path: Path) -> RunStore:
    """A run with two files that the task prepared, and the results of two stages."""
    store = RunStore(str(tmp_path / "stored"), "run")
    folder = tmp_path / "made"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "teacher.pt").write_bytes(bytes(range(256)))
    (folder / "words.txt").write_text("some words, of which one bit may change")
    for name in ("prepared", "stages/0", "stages/1"):
        store.upload(name, folder)
    store.write_record(RunRecord("run", "", "", "2026-11-25T07:00:00+00:00", stages_done=2, prepared=True))
    return store


@pytest.mark.parametrize("damage", DAMAGES)
def test_prepared_files_that_are_damaged_train_nobody(uploaded: RunStore, tmp_path: Path, damage: str) -> None:
    assert uploaded.fetch_prepared(tmp_path / "copy") is not None
    DAMAGES[damage](tmp_path / "stored" / "runs" / "run" / "prepared" / "below" / "teacher.pt")
    with pytest.raises(ArtifactError, match=r"prepared: it is damaged: below/teacher.pt .*begin a new run"):
        uploaded.fetch_prepared(tmp_path / "copy")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["1/words.txt", "1.sha256.json"])
def test_a_stage_whose_result_is_damaged_counts_as_not_finished(
    uploaded: RunStore, tmp_path: Path, file: str, damage: str
) -> None:
    """A flipped bit of its weights would else go on into the next stage without a word."""
    assert uploaded.whole_stages(2) == (2, "")
    DAMAGES[damage](tmp_path / "stored" / "runs" / "run" / "stages" / file)
    whole, told = uploaded.whole_stages(2)
    assert whole == 1 and "stages/1" in told


def test_a_stage_without_a_whole_checkpoint_begins_anew(run_store: RunStore, tmp_path: Path) -> None:
    for folder in (tmp_path / "train" / "run" / "prune").iterdir():
        _flip(folder / "model.safetensors")
    state, damaged = run_store.last_state("prune")
    assert state is None and len(damaged) == 2
    assert run_store.last_state("never begun") == (None, ())


def _job(tmp_path: Path, **changes: Any) -> Any:
    raw = tiny.job(steps=64) | {"storage": {"uri": str(tmp_path)}}
    for key, value in changes.items():
        raw[key] = raw.get(key, {}) | value
    return parse_job(raw)


def _begun(tmp_path: Path, run: str = "20261125-070000-aaaaaa") -> RunStore:
    job = _job(tmp_path)
    store = RunStore(job_uri(job), run)
    store.write_record(RunRecord(run, job.result_digest(), job.to_yaml(), "2026-11-25T07:00:00+00:00"))
    return store


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling": {"num_workers": 4, "max_failures": 9, "threads_per_worker": 2}},
        {"cluster": {"address": "10.0.0.1:6379", "num_cpus": 3}},
        {"training": {"num_data_workers": 2, "checkpoint_every_epochs": 3}},
    ],
)
def test_a_run_is_found_by_what_decides_its_result(tmp_path: Path, changes: dict[str, Any]) -> None:
    begun = _begun(tmp_path)
    found = unfinished_run(_job(tmp_path, **changes), print)
    assert found is not None and found.run == begun.run


@pytest.mark.parametrize(
    "changes",
    [{"training": {"seed": 1}}, {"training": {"global_batch_size": 8}}, {"task": {"arguments": {"samples": 7}}}],
)
def test_a_job_of_another_result_finds_no_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    _begun(tmp_path)
    assert unfinished_run(_job(tmp_path, **changes), print) is None


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_of_a_record_is_believed(tmp_path: Path, bit: int) -> None:
    """`"stages_done": 0` may become 1, and the stage would be taken for trained."""
    begun = _begun(tmp_path)
    before, content = begun.read_record(), begun.files.read_bytes("run.json")
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        begun.files.write_bytes("run.json", bytes(flipped))
        try:
            found = begun.read_record()
        except ArtifactError:
            continue
        assert found == before


@pytest.mark.parametrize("content", ["", "{", '{"run": "x"}', "[" * 5000, "\xff", "null", '{"record": 1, "sha256": 1}'])
def test_a_damaged_record_is_told_and_an_older_run_found(tmp_path: Path, content: str) -> None:
    older, newer = _begun(tmp_path), _begun(tmp_path, "20261125-080000-bbbbbb")
    newer.files.write_bytes("run.json", content.encode("latin-1"))
    told: list[str] = []
    found = unfinished_run(_job(tmp_path), told.append)
    assert found is not None and found.run == older.run
    (line,) = told
    assert newer.run in line and "can't be resumed" in line and "run.json" in line and "damaged" in line
