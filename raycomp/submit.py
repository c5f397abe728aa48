"""Submits a job file to a cluster through Ray Jobs, follows its log, and finds out how it really ended."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import raycomp
from raycomp.config import JobConfig
from raycomp.config.storage import deleted_by_ray
from raycomp.errors import ClusterError, ConfigError, Problem
from raycomp.report.table import ARTIFACT_LABEL
from raycomp.storage import s3

_API_ADDRESS = "RAY_API_SERVER_ADDRESS"
_EXCLUDES = (".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "artifacts", "results")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_TERMINAL = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_PATIENCE_S = 60.0
_POLL_S = 1.0


class JobsClient(Protocol):
    """What raycomp uses of `ray.job_submission.JobSubmissionClient`."""

    def submit_job(
        self, *, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str], submission_id: str
    ) -> str:
        """Starts a job under an id that no other has."""

    def get_job_info(self, job_id: str) -> Any:
        """An object with `status`, `message` and `driver_exit_code`."""

    def get_job_logs(self, job_id: str) -> str:
        """All that the job has printed."""

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """The job's output from its beginning on, as it comes."""


@dataclass(frozen=True)
class Submission:
    """What is sent to the cluster.

    Args:
        name: the job's name.
        entrypoint: the command line that the head node runs in the working directory.
        working_dir: the folder that is copied to the cluster.
        env_vars: the job's environment; its values may be secrets.
        py_modules: Python packages that are copied along.
    """

    name: str
    entrypoint: str
    working_dir: Path
    env_vars: dict[str, str] = field(repr=False)
    py_modules: tuple[Path, ...] = ()

    @property
    def secrets(self) -> tuple[str, ...]:
        """The names of the variables with secrets that go along."""
        return s3.secrets_in(self.env_vars)

    def runtime_env(self) -> dict[str, Any]:
        """Ray's description of the job's environment."""
        described: dict[str, Any] = {
            "working_dir": str(self.working_dir),
            "excludes": list(_EXCLUDES),
            "env_vars": self.env_vars,
        }
        if self.py_modules:
            described["py_modules"] = [str(path) for path in self.py_modules]
        return described


@dataclass(frozen=True)
class Outcome:
    """How a submitted job ended: the exit code to pass on, and the reason where it is not 0."""

    exit_code: int
    reason: str = ""


def plan_submission(
    job: JobConfig,
    job_file: Path,
    working_dir: Path,
    *,
    settings: Sequence[str] = (),
    resume: bool = False,
    ship_raycomp: bool = False,
) -> Submission:
    """What to send so that the cluster runs a job file as `raycomp run` would here.

    Args:
        job: the job, with its settings in force.
        job_file: where it stands.
        working_dir: the folder that goes along; it must hold the job file and its task.
        settings: `key=value` overrides.
        resume: whether to go on with an unfinished run.
        ship_raycomp: send this raycomp along, for a cluster that has none or another one.

    Raises:
        ConfigError: the job can't run there as it is.
    """
    root, file = working_dir.resolve(), job_file.resolve()
    problems = [*_folder_problems(job, file, root), *_storage_problems(job, job_file)]
    if problems:
        raise ConfigError(problems)
    command = ["python", "-m", "raycomp", "run", file.relative_to(root).as_posix()]
    command += ["--resume"] if resume else []
    for setting in settings:
        command += ["--set", setting]
    # An interpreter that buffers, or a terminal's width that is not known, would make the log unreadable.
    env_vars = {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    if job.storage.uri.startswith("s3://"):
        env_vars |= s3.environment(credentials=job.cluster.send_credentials)
    modules = (Path(raycomp.__file__).resolve().parent,) if ship_raycomp else ()
    return Submission(job.name, shlex.join(command), root, env_vars, modules)


@contextmanager
def jobs_client(address: str) -> Iterator[JobsClient]:
    """A client for the dashboard at `address`; errors within the block become raycomp's.

    Raises:
        ClusterError: the dashboard can't be reached or refuses.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise ClusterError(
            f"got {address!r}", where="--address", remedy="should be the dashboard's address, http://host:8265"
        )
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray lets RAY_ADDRESS win over an address that is given; only this variable wins over both.
    before = os.environ.get(_API_ADDRESS)
    os.environ[_API_ADDRESS] = address
    try:
        yield JobSubmissionClient(address)
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token"
        raise ClusterError(f"the cluster refuses: {_first_line(error)}", where=address, remedy=remedy) from error
    except (RuntimeError, OSError, ValueError) as error:
        remedy = "is it the dashboard's address, http://host:8265, and does the cluster run?"
        raise ClusterError(f"Ray Jobs can't be used: {_first_line(error)}", where=address, remedy=remedy) from error
    finally:
        if before is None:
            del os.environ[_API_ADDRESS]
        else:
            os.environ[_API_ADDRESS] = before


def send(client: JobsClient, submission: Submission, *, sleep: Callable[[float], None] = time.sleep) -> str:
    """Submits, and waits for the agent of a head node that has just come up.

    Returns:
        The submission id.

    Raises:
        RuntimeError, OSError: Ray refuses, or is lost.
    """
    submission_id = f"{submission.name}-{uuid4().hex[:8]}"
    for attempt in itertools.count():
        try:
            client.submit_job(
                entrypoint=submission.entrypoint,
                runtime_env=submission.runtime_env(),
                metadata={"raycomp_job": submission.name},
                submission_id=submission_id,
            )
            break
        except (RuntimeError, OSError) as error:
            # An answer that was lost on its way: the id shows that the job is there.
            if attempt and "already exists" in str(error):
                break
            passing = isinstance(error, OSError) or "No available agent" in str(error)
            if not passing or attempt * _POLL_S >= _PATIENCE_S:
                raise
        sleep(_POLL_S)
    return submission_id


def follow(
    client: JobsClient,
    submission_id: str,
    write: Callable[[str], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Writes the job's log as it comes, until the job has ended; a lost connection is taken up again for a minute.

    Raises:
        RuntimeError, OSError: the cluster is lost.
    """
    log = _Log(write)
    failures = 0
    while True:
        before = log.written
        try:
            asyncio.run(_tail(client, submission_id, log))
            details = client.get_job_info(submission_id)
            if _status(details) in _TERMINAL:
                logs = client.get_job_logs(submission_id)
                log.take(len(logs), logs)
                return outcome(details, logs)
            failures = 0
        except (RuntimeError, OSError):
            failures = 1 if log.written > before else failures + 1
            if failures * _POLL_S > _PATIENCE_S:
                raise
        sleep(_POLL_S)


def outcome(details: Any, logs: str) -> Outcome:
    """How the job ended, from Ray's details and from what our own command prints when the artifact is published.

    Ray may call a driver that was killed a success, so a success needs the line that names the artifact.
    """
    status, code = _status(details), details.driver_exit_code
    if status == "STOPPED":
        return Outcome(1, "the job was stopped")
    if status == "FAILED":
        if code:
            return Outcome(code if code > 0 else 128 - code, f"the job ended with exit code {code}")
        return Outcome(1, f"the job failed: {_first_line(details.message)}")
    if not any(line.startswith(ARTIFACT_LABEL) for line in logs.splitlines()):
        return Outcome(1, "Ray calls the job a success, but it published no artifact: its driver was killed")
    return Outcome(0)


@dataclass
class _Log:
    """Writes each character of a log once, however often the log is read from its beginning."""

    write: Callable[[str], None]
    written: int = 0

    def take(self, end: int, text: str) -> None:
        """Takes the piece of the log that ends at position `end`."""
        if end > self.written:
            self.write(text[-(end - self.written) :])
            self.written = end


async def _tail(client: JobsClient, submission_id: str, log: _Log) -> None:
    from aiohttp import ClientError

    end = 0
    try:
        async for text in client.tail_job_logs(submission_id):
            end += len(text)
            log.take(end, text)
    except ClientError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def _folder_problems(job: JobConfig, file: Path, root: Path) -> Iterator[Problem]:
    if not root.is_dir():
        yield Problem("--working-dir", f"there is no folder '{root}'")
        return
    if not file.is_relative_to(root):
        yield Problem(
            str(file), f"it is outside of the working directory '{root}'", "give --working-dir a folder that holds it"
        )
    source, separator, _ = job.task.entrypoint.partition(".py:")
    task_file = (file.parent / f"{source}.py").resolve()
    if separator and not task_file.is_relative_to(root):
        yield Problem(
            "task.entrypoint", f"'{task_file}' is outside of the working directory '{root}'", "move it inside"
        )


def _storage_problems(job: JobConfig, file: Path) -> Iterator[Problem]:
    uri = job.storage.uri
    if "://" not in uri and not Path(uri).is_absolute():
        yield deleted_by_ray(f"{file} storage.uri", uri)


def _status(details: Any) -> str:
    return str(getattr(details.status, "value", details.status))


def _first_line(error: object) -> str:
    lines = str(error or "").strip().splitlines()
    return lines[0] if lines else type(error).__name__
