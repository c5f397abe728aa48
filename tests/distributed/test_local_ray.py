"""The Ray that a job starts for itself: who can reach it, and what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil  # Ray brings it along, once it is imported (by conftest).
import pytest
from pyarrow import fs

from raycomp.config import parse_job
from raycomp.distributed import cluster
from tests.conftest import ObjectStore
from tests.contracts import tiny
from tests.distributed.conftest import driver

# What a job on a Ray of its own does; it goes on once a line comes in, so that others may look at it meanwhile.
_RUN = """
import json, sys, ray
from raycomp import CompressionJob

class Listener:
    seen = False
    def message(self, line): print("message", line, flush=True)
    def event(self, event):
        if not self.seen:
            self.seen = True
            from ray._private.worker import _global_node as node
            found = [node.gcs_address, node.dashboard_agent_listen_port, node.get_session_dir_path()]
            print("looked", json.dumps(found), flush=True)
            sys.stdin.readline()

result = CompressionJob(json.loads(sys.argv[1]), base_dir=".").fit(progress=Listener())
print("artifact", result.artifact_uri, flush=True)
"""
_STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1])
except Exception as error:
    print("refused", type(error).__name__)
else:
    print("connected")
"""
_PLANTED = "planted-secret-of-another-service"


@dataclass(frozen=True)
class Seen:
    """What was seen of a job, during its training and after it.

    Args:
        listening: process, address and port of each socket that its processes listened on.
        stranger: how a process without the token fared as a driver.
        jobs_status: the HTTP status that it got for a job of its own; None where another Ray of this machine has the
            port that Ray's agents want.
        secrets: the secrets in the job's environment.
        output: what the job printed.
        session: Ray's folder of this session.
        stored: the files in storage, with their contents.
    """

    listening: list[tuple[str, str, int]]
    stranger: str
    jobs_status: int | None
    secrets: tuple[str, ...]
    output: str
    session: Path
    stored: dict[str, bytes]


@pytest.fixture(scope="module")
def seen(object_store: ObjectStore) -> Seen:
    # Long enough to be looked at.
    job = tiny.job(tiny.pruner("L1NormPruner"), steps=160, checkpoint_every_epochs=10)
    uri = object_store.uri()
    job |= {"storage": {"uri": uri}, "scaling": {"num_workers": 2}}
    environment = {**object_store.environment(), "AWS_BEARER_TOKEN_BEDROCK": _PLANTED}
    process = driver(_RUN, json.dumps(job), **environment)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("looked "):
                break
        gcs, port, session = json.loads(lines[-1].removeprefix("looked "))
        listening, stranger = _listening(process.pid), _stranger(gcs)
        status = _job_of_a_stranger(port) if port in {found for _, _, found in listening} else None
        out, err = process.communicate("go on\n", timeout=200)
    finally:
        process.kill()
    assert "artifact s3://" in out, err
    secrets = (object_store.secret_key, _PLANTED)
    stored = _files(object_store.filesystem(), uri.removeprefix("s3://"))
    return Seen(listening, stranger, status, secrets, "".join(lines) + out + err, Path(session), stored)


def _listening(pid: int) -> list[tuple[str, str, int]]:
    root, found = psutil.Process(pid), list[tuple[str, str, int]]()
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("inet")
            found += [(process.name(), *item.laddr) for item in sockets if item.status == psutil.CONN_LISTEN]
    return found


def _stranger(gcs: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    command = [sys.executable, "-c", _STRANGER, gcs]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=100).stdout.strip()


def _job_of_a_stranger(port: int) -> int:
    body = json.dumps({"entrypoint": "id"}).encode()
    request = Request(f"http://127.0.0.1:{port}/api/job_agent/jobs/", body, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def _files(filesystem: fs.FileSystem, prefix: str) -> dict[str, bytes]:
    found = filesystem.get_file_info(fs.FileSelector(prefix, recursive=True))
    return {
        info.path: filesystem.open_input_stream(info.path).readall() for info in found if info.type == fs.FileType.File
    }


@pytest.mark.cluster
def test_every_socket_of_a_job_s_own_ray_is_on_loopback(seen: Seen) -> None:
    processes = {name for name, _, _ in seen.listening}
    assert {"gcs_server", "raylet"} <= processes
    assert sum("RayTrainWorker" in name for name, _, _ in seen.listening) >= 2, processes
    reachable = [(name, ip) for name, ip, _ in seen.listening if not _is_loopback(ip)]
    assert reachable == []


def _is_loopback(ip: str) -> bool:
    address = ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.cluster
def test_a_process_without_the_token_is_refused(seen: Seen) -> None:
    assert seen.stranger == "refused AuthenticationError"
    assert seen.jobs_status in (401, None)


@pytest.mark.cluster
def test_secrets_stay_in_the_environment_of_a_job_s_processes(seen: Seen) -> None:
    logs = {str(path): path.read_bytes() for path in seen.session.rglob("*") if path.is_file()}
    assert any(name.endswith("raylet.out") for name in logs)
    names = " ".join(seen.stored)
    assert all(part in names for part in ("manifest.json", "report.html", "run.json", "checkpoint"))
    places = {**logs, **seen.stored, "output": seen.output.encode()}
    found = [(name, secret) for name, data in places.items() for secret in seen.secrets if secret.encode() in data]
    assert found == []


def test_a_cluster_gets_the_storage_s_keys_and_no_other_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    environment = _sent({"storage": {"uri": "s3://bucket/x"}}, told, monkeypatch)
    assert environment["AWS_SECRET_ACCESS_KEY"] == "hidden" and environment["AWS_REGION"] == "eu-central-1"
    assert _PLANTED not in environment.values()
    (line,) = told
    assert "AWS_SECRET_ACCESS_KEY" in line and "send_credentials: false" in line and "hidden" not in line


@pytest.mark.parametrize(
    "more",
    [
        {"storage": {"uri": "/shared/models"}},
        {"storage": {"uri": "s3://bucket/x"}, "cluster": {"send_credentials": False}},
    ],
)
def test_a_cluster_that_needs_no_keys_gets_none(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    assert "hidden" not in _sent(more, told, monkeypatch).values()
    assert told == []


def _sent(more: dict[str, Any], told: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in cluster._TRAIN_SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", _PLANTED)
    sent = cluster._runtime_env(parse_job(tiny.job(steps=1) | more), told.append)
    return {} if sent is None else sent["env_vars"]
