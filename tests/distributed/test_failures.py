"""What ends a run and what is tried again, without Ray's processes; and what is refused before Ray is asked."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch.distributed as dist
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.execution.storage import StorageContext

from raycomp import CompressionJob
from raycomp.distributed import job as job_module
from raycomp.distributed import run_store as run_store_module
from raycomp.distributed.failures import StopOnOurErrors, translated
from raycomp.distributed.run_store import RunRecord, RunStore
from raycomp.distributed.worker import _RayListener
from raycomp.errors import ClusterError, StorageError, TaskError
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.user_code import user_code
from raycomp.storage.explain import explain
from tests.conftest import ObjectStore
from tests.contracts import tiny
from tests.distributed.conftest import ROOT

# As gloo words it where a peer was killed in the middle of a forward pass.
_PEER_LOST = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:22445."
)


# As Ray words it, shortened.
_DIED = SystemError(
    "A worker health check failed.\nWorker info: Worker(\n  actor=Actor(RayTrainWorker, 82b6),\n)\nThe actor died "
    "unexpectedly before finishing this task.\n\tpid: 12921\nThe actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2."
)


class _Sink:
    """The actor that hears of progress."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.push = SimpleNamespace(remote=self.heard.append)


def test_a_replaced_worker_is_told_with_its_reason() -> None:
    """Its neighbours' broken connections are no reason."""
    sink = _Sink()
    StopOnOurErrors(sink).after_exception(None, {0: _PEER_LOST, 1: _DIED, 2: _PEER_LOST})
    assert sink.heard == [
        "worker 1 failed: its worker process has died (killed, out of memory, or crashed): new workers go on from the "
        "last checkpoint"
    ]


def _raised_in_user_code(error: Exception) -> Exception:
    try:
        with user_code("Tiny.training_step()"):
            raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize("lost", [_PEER_LOST, dist.DistNetworkError("the connection broke")])
def test_a_lost_peer_is_no_error_of_the_task(lost: Exception) -> None:
    """Else a killed worker would end the job, because its neighbours meet its death in the user's forward pass."""
    assert _raised_in_user_code(lost) is lost
    StopOnOurErrors(_Sink()).after_exception(None, {0: _raised_in_user_code(lost), 1: SystemError("the actor died")})


def test_an_error_of_the_task_ends_the_run() -> None:
    failures = {0: RuntimeError("collateral"), 1: _raised_in_user_code(RuntimeError("the mask has a wrong shape"))}
    with pytest.raises(TaskError, match=r"Tiny.training_step\(\) raised RuntimeError: the mask has a wrong shape"):
        StopOnOurErrors(_Sink()).after_exception(None, failures)


def test_storage_that_is_away_is_tried_again() -> None:
    """Also where a fresh worker meets it first."""
    away = explain(ConnectionRefusedError("refused"), "s3://bucket/run")
    StopOnOurErrors(_Sink()).after_exception(None, {0: away, 1: RuntimeError("collateral")})


def _begun(root: Path) -> RunStore:
    run_store = RunStore(str(root / "job"), "run")
    run_store.write_record(RunRecord("run", "digest", "", "now"))
    return run_store


def test_storage_that_went_away_is_told_as_such_and_a_checkpoint_does_not_make_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_store = _begun(tmp_path / "volume")
    (tmp_path / "volume").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(run_store_module, "_LOOK_S", 0.0)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    state = StageState("prune", 1, 4, {}, {}, ())
    with pytest.raises(StorageError, match=r"/volume/job/runs/run: the storage is away") as caught:
        _RayListener(SimpleNamespace(), run_store).checkpoint(lambda: state, {})
    assert caught.value.passing and not (tmp_path / "volume").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "volume")
    run_store.require()


def test_ray_s_storage_that_is_away_is_told_with_its_place(tmp_path: Path) -> None:
    sink = _Sink()
    context = StorageContext(str(tmp_path), "run")
    (marker,) = (path for path in (tmp_path / "run").iterdir())
    marker.unlink()
    with pytest.raises(RuntimeError) as caught:
        context._check_validation_file()
    StopOnOurErrors(sink).after_exception(None, {0: caught.value})
    (told,) = sink.heard
    assert told.startswith(f"worker 0 failed: the storage at {tmp_path} is away from its node, or is not the one")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_checkpoint_ends_the_run_at_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's upload raises a plain OSError, which Ray would take for a lost worker."""

    def report(*_: Any, **__: Any) -> None:
        raise OSError(f"Error writing bytes to file. Detail: [errno {number}] {os.strerror(number)}")

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    state = StageState("prune", 1, 4, {}, {}, ())
    with pytest.raises(StorageError) as caught:
        _RayListener(SimpleNamespace(), _begun(tmp_path)).checkpoint(lambda: state, {})
    with pytest.raises(StorageError, match=r"/train/run: the (disk is full|file system is read-only)"):
        StopOnOurErrors(_Sink()).after_exception(None, {0: caught.value})


def test_storage_that_fails_under_ray_s_controller_is_told_as_such() -> None:
    with (
        pytest.raises(StorageError, match="s3://bucket/run: the store can't be reached"),
        translated("s3://bucket/run"),
    ):
        raise ControllerError(ConnectionRefusedError("refused"))


def test_a_lost_controller_says_how_to_go_on() -> None:
    text = "The actor died before it finished this task.\nThe actor is dead because its owner has died. And more."
    with pytest.raises(ClusterError, match=r"its owner has died \(run again with --resume"), translated("/models/run"):
        raise ray.exceptions.RayActorError(None, text)


def test_of_several_errors_the_lowest_rank_s_is_told() -> None:
    with pytest.raises(TaskError, match="first"):
        StopOnOurErrors(_Sink()).after_exception(None, {3: TaskError("second"), 2: TaskError("first")})


def test_ray_s_errors_become_one_of_ours() -> None:
    with pytest.raises(TaskError, match="no such image"), translated("s3://bucket/run"):
        raise ControllerError(TaskError("no such image"))
    lost = WorkerGroupError("2 workers failed", {1: RuntimeError("worker died\nand\nmuch\nmore"), 2: OSError("x")})
    with (
        pytest.raises(ClusterError, match=r"worker 1 failed: RuntimeError: worker died \(raise") as caught,
        translated("r"),
    ):
        raise lost
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(job_module, "connect", refuse)


def _fit(uri: str, endpoint: str) -> None:
    storage = {"uri": uri, "endpoint": endpoint, "region": "us-east-1"}
    CompressionJob({**tiny.job(steps=1), "storage": storage}, base_dir=ROOT).fit()


def test_a_wrong_secret_is_refused_before_ray_starts(no_ray: None, wrong_secret: ObjectStore) -> None:
    uri = wrong_secret.uri()
    with pytest.raises(StorageError, match=r"secret|signature|credentials|denied"):
        _fit(uri, wrong_secret.endpoint)
    prefix = uri.removeprefix("s3://")
    filesystem = wrong_secret.filesystem()
    assert filesystem.get_file_info(prefix).type.name == "NotFound"


def test_an_unreachable_endpoint_is_refused_before_ray_starts(no_ray: None, object_store_keys: ObjectStore) -> None:
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1"):
        _fit(object_store_keys.uri(), "http://127.0.0.1:1")
