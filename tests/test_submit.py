"""Submission: what is sent, how a log is followed, and how a job's end is read; once against a real Ray."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml

from raycomp.config import load_job
from raycomp.errors import ClusterError, ConfigError
from raycomp.submit import Outcome, Submission, follow, jobs_client, outcome, plan_submission, send

_START_TIMEOUT_S = 120
DONE = "training\nartifact  s3://bucket/job/artifacts/1\n"


@dataclass
class Details:
    """What Ray says about a job."""

    status: str
    message: str = ""
    driver_exit_code: int | None = None


@dataclass
class FakeClient:
    """Plays Ray Jobs from a script: what each tail yields or raises, and each answer about the job."""

    tails: list[list[str | Exception]] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)
    logs: str = ""
    refusals: list[Exception] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)

    def submit_job(self, **request: Any) -> str:
        if self.refusals:
            raise self.refusals.pop(0)
        self.submitted.append(request)
        return str(request["submission_id"])

    def get_job_info(self, job_id: str) -> Details:
        return self.details.pop(0)

    def get_job_logs(self, job_id: str) -> str:
        return self.logs

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self.tails.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text


def _job_file(folder: Path, uri: str = "s3://bucket/prefix", entrypoint: str = "task.py:Task") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text("")
    file = folder / "job file.yaml"
    job = {
        "name": "small",
        "task": {"entrypoint": entrypoint},
        "training": {"epochs": 1},
        "storage": {"uri": uri},
        "stages": [
            {
                "name": "one",
                "compressors": [
                    {"type": "L1NormPruner", "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]}
                ],
            }
        ],
    }
    file.write_text(yaml.safe_dump(job))
    return file


def _plan(file: Path, root: Path, **options: Any) -> Submission:
    return plan_submission(load_job(file), file, root, **options)


def test_the_cluster_runs_the_same_command_in_the_copied_folder(tmp_path: Path) -> None:
    file = _job_file(tmp_path / "jobs")
    plan = _plan(file, tmp_path, settings=("name=a b", "training.epochs=3"), resume=True)
    assert plan.entrypoint == (
        "python -m raycomp run 'jobs/job file.yaml' --resume --set 'name=a b' --set training.epochs=3"
    )
    environment = plan.runtime_env()
    assert environment["working_dir"] == str(tmp_path.resolve())
    assert {".git", ".venv", "artifacts"} <= set(environment["excludes"])
    assert "py_modules" not in environment


def test_raycomp_goes_along_when_asked_for(tmp_path: Path) -> None:
    (module,) = _plan(_job_file(tmp_path), tmp_path, ship_raycomp=True).runtime_env()["py_modules"]
    assert (Path(module) / "submit.py").is_file() and Path(module).name == "raycomp"


def test_credentials_go_along_for_object_storage_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_PROFILE", "of-this-machine")
    to_bucket = _plan(_job_file(tmp_path / "a"), tmp_path)
    to_folder = _plan(_job_file(tmp_path / "b", uri=str(tmp_path / "shared")), tmp_path)
    assert to_bucket.env_vars["AWS_ACCESS_KEY_ID"] == "key"
    assert to_bucket.env_vars["AWS_SECRET_ACCESS_KEY"] == "hidden"
    assert "AWS_PROFILE" not in to_bucket.env_vars, "it names a file that the cluster has not"
    assert not any(name.startswith("AWS") for name in to_folder.env_vars)
    assert "hidden" not in repr(to_bucket)


def test_no_secret_goes_along_where_the_nodes_have_credentials_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's Jobs API shows what it is given."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    file = _job_file(tmp_path)
    assert _plan(file, tmp_path).secrets == ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    file.write_text(file.read_text() + "cluster: {send_credentials: false}\n")
    plan = _plan(file, tmp_path)
    assert plan.secrets == () and "hidden" not in str(plan.runtime_env())
    assert plan.env_vars["AWS_REGION"] == "eu-central-1"


def test_what_cannot_work_there_is_refused_all_at_once(tmp_path: Path) -> None:
    file = _job_file(tmp_path / "jobs", uri="artifacts", entrypoint="../../outside/task.py:Task")
    with pytest.raises(ConfigError) as caught:
        _plan(file, tmp_path / "jobs")
    text = str(caught.value)
    assert "would lie in the job's own folder on the cluster" in text and "--set storage.uri" in text
    assert "outside of the working directory" in text


def test_a_job_file_outside_of_the_working_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="outside of the working directory"):
        _plan(_job_file(tmp_path / "jobs"), tmp_path / "other")
    with pytest.raises(ConfigError, match="there is no folder"):
        _plan(_job_file(tmp_path / "jobs"), tmp_path / "nowhere")


def _submission(tmp_path: Path) -> Submission:
    return Submission("small", "true", tmp_path, {})


def test_a_head_node_that_just_came_up_is_waited_for(tmp_path: Path) -> None:
    agent = RuntimeError("500: No available agent to submit job, please try again later.")
    client = FakeClient(refusals=[agent, ConnectionResetError("gone"), agent])
    waits: list[float] = []
    submission_id = send(client, _submission(tmp_path), sleep=waits.append)
    assert len(waits) == 3
    assert client.submitted[0]["submission_id"] == submission_id
    assert client.submitted[0]["metadata"] == {"raycomp_job": "small"}


def test_a_lost_answer_does_not_start_a_job_twice(tmp_path: Path) -> None:
    exists = RuntimeError("400: Job with submission_id small-1 already exists.")
    client = FakeClient(refusals=[ConnectionResetError("gone"), exists])
    assert send(client, _submission(tmp_path), sleep=lambda _: None).startswith("small-")
    assert client.submitted == []


@pytest.mark.parametrize("refusal", ["bad runtime_env", "Job with submission_id small-1 already exists."])
def test_other_refusals_are_final(tmp_path: Path, refusal: str) -> None:
    with pytest.raises(RuntimeError, match=refusal):
        send(FakeClient(refusals=[RuntimeError(refusal)]), _submission(tmp_path), sleep=lambda _: None)


def test_waiting_for_the_agent_ends(tmp_path: Path) -> None:
    waits: list[float] = []
    client = FakeClient(refusals=[RuntimeError("No available agent") for _ in range(1000)])
    with pytest.raises(RuntimeError, match="No available agent"):
        send(client, _submission(tmp_path), sleep=waits.append)
    assert 10 <= sum(waits) <= 120


def _followed(client: FakeClient) -> tuple[str, Outcome, list[float]]:
    written: list[str] = []
    waits: list[float] = []
    ended = follow(client, "raysubmit_1", written.append, sleep=waits.append)
    return "".join(written), ended, waits


def test_the_log_is_written_once_and_success_is_0() -> None:
    client = FakeClient([["train", "ing\n", DONE[9:]]], [Details("SUCCEEDED", driver_exit_code=0)], DONE)
    assert _followed(client)[:2] == (DONE, Outcome(0))


def test_a_lost_connection_is_taken_up_where_it_broke() -> None:
    tails: list[list[str | Exception]] = [
        [DONE[:5], RuntimeError("WebSocket connection closed unexpectedly")],
        [ConnectionResetError("gone")],
        [DONE[:3], DONE[3:12], ConnectionResetError("gone again")],
        [DONE],
    ]
    written, ended, waits = _followed(FakeClient(tails, [Details("SUCCEEDED", driver_exit_code=0)], DONE))
    assert (written, ended) == (DONE, Outcome(0))
    assert len(waits) == 3


def test_a_log_that_ends_before_the_job_is_followed_further_and_completed() -> None:
    details = [Details("RUNNING"), Details("SUCCEEDED", driver_exit_code=0)]
    client = FakeClient([[DONE[:4]], [DONE[:8]]], details, DONE)
    assert _followed(client)[:2] == (DONE, Outcome(0))


def test_a_cluster_that_is_gone_is_an_error_in_the_end() -> None:
    with pytest.raises(ConnectionError):
        _followed(FakeClient([[ConnectionRefusedError("gone")] for _ in range(500)]))


def test_an_answer_about_the_job_that_is_lost_is_asked_for_again() -> None:
    class Flaky(FakeClient):
        def get_job_info(self, job_id: str) -> Details:
            answer = self.details.pop(0)
            if answer.status == "lost":
                raise ConnectionError("remote end closed connection")
            return answer

    client = Flaky([[DONE], [DONE]], [Details("lost"), Details("SUCCEEDED", driver_exit_code=0)], DONE)
    assert _followed(client)[:2] == (DONE, Outcome(0))


@pytest.mark.parametrize(
    ("details", "logs", "code", "reason"),
    [
        (Details("SUCCEEDED", driver_exit_code=0), DONE, 0, ""),
        (Details("FAILED", "…", 3), "", 3, "exit code 3"),
        (Details("FAILED", "…", 137), "", 137, "exit code 137"),
        (Details("FAILED", "…", -9), "", 137, "exit code -9"),
        (
            Details("FAILED", "runtime_env setup failed: no such file\nmore"),
            "",
            1,
            "runtime_env setup failed: no such file",
        ),
        (Details("STOPPED"), DONE, 1, "stopped"),
        (Details("SUCCEEDED", driver_exit_code=0), "training\n", 1, "published no artifact"),
        (Details("SUCCEEDED"), "it said: artifact  s3://…\n", 1, "published no artifact"),
    ],
)
def test_the_end_of_a_job_is_read_right(details: Details, logs: str, code: int, reason: str) -> None:
    ended = outcome(details, logs)
    assert ended.exit_code == code
    assert reason in ended.reason and bool(reason) == bool(ended.reason)


def test_an_address_that_is_none_is_said() -> None:
    with pytest.raises(ClusterError, match="http://host:8265"), jobs_client("ray://127.0.0.1:10001"):
        pass


def test_nobody_at_the_address_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", "http://192.0.2.1:8265")
    with pytest.raises(ClusterError, match="Failed to connect") as caught, jobs_client(address):
        pass
    assert caught.value.where == address, "the address that was given, not the environment's"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


_SCRIPT = """
import os, signal, sys
print("hello from", os.path.basename(os.getcwd())[:4], os.environ["GIVEN"], os.path.exists("artifacts"), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "0":
    print("artifact  /somewhere")
raise SystemExit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head node of this test's own, and its dashboard's address."""
    # Sockets below the temporary folder must have short paths.
    folder = tempfile.mkdtemp(prefix="rc")
    port, dashboard, *others = _free_ports(6)
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
        "ray-client-server-port",
    )
    command += [f"--{name}={other}" for name, other in zip(names, others, strict=True)]
    command += [f"--temp-dir={folder}", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with log.open("wb") as stream:
        head = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, cwd="/"
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(head, address, log)
        yield address
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(head: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(_START_TIMEOUT_S * 2):
        try:
            with urlopen(f"{address}/api/version", timeout=5):
                return
        except OSError:
            pass
        try:
            head.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"Ray did not start\n{log.read_text(errors='replace')[-2000:]}")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


@pytest.mark.cluster
def test_a_real_cluster_runs_the_copied_folder_and_its_exit_codes_come_back(
    ray_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "large").write_text("not to be sent")
    (tmp_path / "end.py").write_text(_SCRIPT)
    found = {}
    with jobs_client(ray_head) as client:
        for how in ("0", "3", "kill"):
            plan = Submission("ends", f"python end.py {how}", tmp_path, {"GIVEN": "by-us"})
            submission = send(client, plan)
            log: list[str] = []
            ended = follow(client, submission, log.append)
            assert "hello from _ray by-us False" in "".join(log)
            found[how] = ended.exit_code
    assert found == {"0": 0, "3": 3, "kill": 137}


_WAITING = """
import ray
from raycomp.distributed.interrupt import interruptible, same_signals

@ray.remote(num_cpus=2)
def never():
    pass

with interruptible():
    with same_signals():
        ray.init(logging_level="error")
    print("waiting", flush=True)
    ray.get(never.remote())
"""


@pytest.mark.cluster
def test_a_stopped_job_leaves_no_stack_of_ray_s(ray_head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "wait.py").write_text(_WAITING)
    log: list[str] = []
    with jobs_client(ray_head) as client:
        root = str(Path(__file__).parents[1])
        submission = send(client, Submission("waits", f"{sys.executable} wait.py", tmp_path, {"PYTHONPATH": root}))

        def write(text: str) -> None:
            log.append(text)
            if "waiting" in text:
                client.stop_job(submission)  # type: ignore[attr-defined]

        ended = follow(client, submission, write)
    assert ended == Outcome(1, "the job was stopped")
    text = "".join(log)
    assert "waiting" in text and "SIGTERM received" not in text and "***" not in text
