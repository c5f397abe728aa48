"""Whole jobs on a real Ray: undisturbed, with a killed worker, with a killed driver, and with a task that raises."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomp import CompressionJob
from raycomp.distributed.job import JobResult
from raycomp.errors import ClusterError, NotFiniteError, TaskError
from raycomp.pipeline.stage import StageStart
from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import FORMS
from raycomp.storage import open_artifact
from tests.conftest import ObjectStore
from tests.contracts import tiny
from tests.contracts.training import Keeper, finish, train
from tests.distributed.conftest import ROOT, driver
from tests.pipeline.ranks import on_ranks

pytestmark = pytest.mark.cluster

_PRUNE = (tiny.scheduled_pruner(3, 4),)
_STEPS = 18
# What the artifact says of the model; the other files tell times and places.
_CONTENT = ("model.safetensors", "masks.safetensors", "calibration.json", "plan.json")

_RUN = """
import json, sys
from raycomp import CompressionJob

class Printer:
    def message(self, line): print("message", line, flush=True)
    def event(self, event): print("event", event.stage, event.epoch, event.step, event.elapsed_s, flush=True)

result = CompressionJob(json.loads(sys.argv[1]), base_dir=".").fit(progress=Printer())
print("artifact", result.artifact_uri)
"""

_LOAD = """
import sys, torch, raycomp
model = raycomp.load(sys.argv[1])
print(model(torch.linspace(-1, 1, 72).view(2, 1, 6, 6)).flatten().tolist())
"""


def _job(storage: Path | str, entrypoint: str = "tests.contracts.tiny:Tiny", **arguments: Any) -> dict[str, Any]:
    job = tiny.job(*_PRUNE, tiny.quantizer(5), tiny.distiller(), arguments={"dropout": 0.3, **arguments}, steps=_STEPS)
    job["task"]["entrypoint"] = entrypoint
    return {**job, "storage": {"uri": str(storage)}}


def _fit(job: dict[str, Any], **options: Any) -> JobResult:
    return CompressionJob(job, base_dir=ROOT).fit(**options)


@pytest.fixture(scope="module")
def undisturbed(local_ray: str, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    return _fit(_job(tmp_path_factory.mktemp("artifacts")))


def _contents(uri: str) -> dict[str, str]:
    return {name: open_artifact(uri).manifest.files[name].sha256 for name in _CONTENT}


def _warnings(uri: str) -> list[str]:
    warnings: list[str] = json.loads(open_artifact(uri).store.read_bytes("summary.json"))["warnings"]
    return warnings


def _loaded_elsewhere(uri: str, **environment: str) -> list[float]:
    out, err = driver(_LOAD, uri, **environment).communicate(timeout=120)
    assert out, err
    outputs: list[float] = json.loads(out)
    return outputs


def test_ray_trains_what_processes_without_ray_train(undisturbed: JobResult, tmp_path: Path) -> None:
    job = _job(tmp_path)
    on_ranks(2, _train_stage, job, 0, None, tmp_path / "checkpoint")
    result = finish(job, tmp_path / "checkpoint")
    assert all(mask.mean() == 0.5 for targets in result.masks.values() for mask in targets.values())
    assert _flat(undisturbed.masks) == _flat(result.masks)
    assert _flat(undisturbed.calibration) == _flat(result.calibration)


def test_another_process_loads_the_artifact(undisturbed: JobResult) -> None:
    found = _loaded_elsewhere(undisturbed.artifact_uri)
    assert len(found) == 6
    assert undisturbed.summary.verification is not None and undisturbed.summary.verification.passed
    assert list(undisturbed.metrics) == list(FORMS)


def test_a_killed_worker_changes_nothing_on_a_real_object_store(
    undisturbed: JobResult, local_ray: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    job = _job(object_store.uri(), "tests.distributed.tasks:Struck", marker=str(marker))
    environment = {**object_store.environment(), "RAY_ADDRESS": local_ray}
    out, err = driver(_RUN, json.dumps(job), **environment).communicate(timeout=280)
    assert "artifact s3://" in out, err
    assert marker.exists()
    assert "Traceback" not in err
    told = "worker 1 failed: its worker process has died (killed, out of memory, or crashed)"
    assert f"message {told}" in out
    elapsed = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("event ")]
    assert elapsed == sorted(elapsed)
    uri = out.rsplit("artifact ", 1)[1].strip()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment().items():
            patch.setenv(name, value)
        assert _contents(uri) == _contents(undisturbed.artifact_uri)
        assert any(warning.startswith(told) for warning in _warnings(uri))
    assert _loaded_elsewhere(uri, **object_store.environment()) == _loaded_elsewhere(undisturbed.artifact_uri)


@dataclass
class _Listener:
    messages: list[str] = field(default_factory=list)
    events: list[ProgressEvent] = field(default_factory=list)

    def message(self, line: str) -> None:
        self.messages.append(line)

    def event(self, event: ProgressEvent) -> None:
        self.events.append(event)


def _settled(stage: Path) -> list[Path]:
    """A stage's checkpoints, once workers that outlive their driver for a moment write no more."""
    before: list[Path] = []
    while before != (now := sorted(stage.rglob("*"))):
        before = now
        time.sleep(2)
    return list(stage.glob("checkpoint_*-*"))


def test_a_killed_driver_s_job_is_resumed_though_its_newest_checkpoint_is_damaged(
    local_ray: str, tmp_path: Path
) -> None:
    job = _job(tmp_path / "artifacts")
    # What was pruned in the first stage is gone in the second, so logits alone still have the teacher's shape.
    logits = {"type": "DynamicLayerwiseDistiller", "config_list": [{"op_names": ["fc"], "apply_method": "kl"}]}
    quantize = [tiny.quantizer(5), logits]
    job["stages"] = [{"name": "prune", "compressors": list(_PRUNE)}, {"name": "quantize", "compressors": quantize}]
    process = driver(_RUN, json.dumps(job), RAY_ADDRESS=local_ray)
    assert process.stdout is not None
    # An epoch's event comes before its checkpoint, so the third one means that two checkpoints are there.
    begun = any(line.startswith("event quantize 3 ") for line in process.stdout)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert begun, err
    assert list((tmp_path / "artifacts").glob("tiny/artifacts/*/manifest.json")) == []
    (stage,) = (tmp_path / "artifacts").glob("tiny/train/*/quantize")
    newest = max(_settled(stage))
    (newest / "model.safetensors").write_bytes(b"")
    (stage / "checkpoint_manager_snapshot.json").write_text("{")  # Ray's list of them

    listener = _Listener()
    job["scaling"]["max_failures"] = 7  # decides nothing of the result
    resumed = _fit(job, resume=True, progress=listener)
    assert listener.messages[1].startswith("resuming run")
    assert any(f"{newest.name} was passed over" in line for line in listener.messages)
    assert any(f"{newest.name} was passed over" in line for line in resumed.summary.warnings)
    assert {event.stage for event in listener.events} == {"quantize"}
    assert min(event.epoch for event in listener.events) >= 2

    on_ranks(2, _train_stage, job, 0, None, tmp_path / "0")
    first = finish(job, tmp_path / "0")
    first.next_start().save(tmp_path / "start")
    on_ranks(2, _train_stage, job, 1, tmp_path / "start", tmp_path / "1")
    last = finish(job, tmp_path / "1", 1, first.next_start())
    assert _flat(resumed.masks) == _flat(first.masks)
    assert _flat(resumed.calibration) == _flat(last.calibration)
    assert {event.stage for event in resumed.summary.history} == {"prune", "quantize"}


def test_a_task_that_raises_on_one_worker_ends_the_job_at_once(
    local_ray: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, artifacts = tmp_path / "begun", tmp_path / "artifacts"
    folder.mkdir()
    with pytest.raises(
        TaskError, match=r"sample \d+ of Unreadable's data raised ValueError: image \d+ can't be read"
    ) as caught:
        _fit(_job(artifacts, "tests.distributed.tasks:Unreadable", folder=str(folder)))
    assert "tasks.py:" in str(caught.value)
    assert sorted(path.name[0] for path in folder.iterdir()) == ["0", "1"]
    assert list(artifacts.glob("tiny/artifacts/*")) == []
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def test_more_cpus_than_there_are_are_refused_before_anything_is_stored(local_ray: str, tmp_path: Path) -> None:
    job = {**_job(tmp_path / "artifacts"), "scaling": {"num_workers": 64}}
    with pytest.raises(ClusterError, match="64 workers with 1 CPU each need 64 CPU, the cluster has 4"):
        _fit(job)
    assert [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()] == []


def _train_stage(rank: int, world: int, job: dict[str, Any], index: int, start: Path | None, folder: Path) -> None:
    train(job, Keeper(folder), index=index, start=StageStart() if start is None else StageStart.load(start))


def _flat(nested: Any, path: str = "") -> dict[str, Any]:
    """Masks or a calibration, in values that compare by every bit."""
    if isinstance(nested, dict):
        return {name: value for key, item in nested.items() for name, value in _flat(item, f"{path}.{key}").items()}
    if isinstance(nested, torch.Tensor):
        return {path: (str(nested.dtype), tuple(nested.shape), nested.numpy().tobytes())}
    return {path: nested}


def test_a_value_that_is_not_finite_ends_the_job_with_its_place_and_publishes_nothing(tmp_path: Path) -> None:
    """It is no lost worker that is tried again."""
    job = _job(tmp_path, "tests.distributed.tasks:Diverging", step=7)
    with pytest.raises(NotFiniteError) as raised:
        _fit(job)
    told = str(raised.value)
    # Rounding turns it into a number, so that the loss doesn't show it.
    assert ": in step 7 range of conv._input_0 is not finite" in told
    assert "the checkpoint of epoch 1 is good" in told
    folder = Path(told.partition(": in step")[0])
    assert [path.name.startswith("checkpoint") for path in folder.iterdir() if path.is_dir()] == [True]
    assert not (tmp_path / "tiny" / "artifacts").exists()
