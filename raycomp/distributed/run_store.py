"""Where a run keeps its files in storage: `<storage>/<job>/{runs,train,artifacts}/<run>`."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from raycomp.config import JobConfig
from raycomp.pipeline.stage import StageStart
from raycomp.storage import Store, open_store

_RECORD = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run besides its checkpoints.

    Args:
        run: its id.
        digest: the job's.
        config_yaml: the job.
        created: UTC time, ISO 8601.
        finished: whether its artifact is published.
        stages_done: stages whose result is stored for the next one.
        prepared: whether the task's prepared files are stored.
    """

    run: str
    digest: str
    config_yaml: str
    created: str
    finished: bool = False
    stages_done: int = 0
    prepared: bool = False


_ADAPTER = TypeAdapter(RunRecord)


@dataclass(frozen=True)
class RunStore:
    """One run's place in a job's storage. Small enough to send to workers: it holds no secrets and no connection.

    Args:
        uri: the job's folder in storage, absolute, with the store's options.
        run: the run's id.
    """

    uri: str
    run: str

    @cached_property
    def store(self) -> Store:
        """The job's folder in storage; a run waits a while for a store that is away."""
        return open_store(self.uri).patient()

    @cached_property
    def files(self) -> Store:
        """The run's own files."""
        return self.store.join("runs", self.run)

    @cached_property
    def artifacts(self) -> Store:
        """Where the job's artifacts are published."""
        return self.store.join("artifacts")

    @property
    def train(self) -> Store:
        """Where Ray Train keeps the run's checkpoints, a folder for each stage."""
        return self.store.join("train", self.run)

    @property
    def artifact_uri(self) -> str:
        """Where the run's artifact is, or will be."""
        return self.artifacts.join(self.run).uri

    def read_record(self) -> RunRecord | None:
        """The run's record; None where there is none that this raycomp can read."""
        if not self.files.exists(_RECORD):
            return None
        try:
            return _ADAPTER.validate_json(self.files.read_bytes(_RECORD))
        except ValidationError:
            return None

    def write_record(self, record: RunRecord) -> None:
        """Stores the record."""
        self.files.write_bytes(_RECORD, _ADAPTER.dump_json(record, indent=1))

    def upload(self, name: str, folder: Path) -> None:
        """Stores a folder's files below the run's."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.files.write_bytes(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def fetch(self, name: str) -> Path:
        """A folder that was uploaded, on this machine."""
        return _local(self.files.join(name))

    def fetch_path(self, path: str) -> Path:
        """A folder on this machine, given its path within the storage's filesystem."""
        return _local(replace(self.store, path=path))

    def fetch_prepared(self) -> Path | None:
        """What the task's `prepare` wrote; None where it wrote nothing."""
        record = self.read_record()
        return self.fetch("prepared") if record is not None and record.prepared else None

    def fetch_start(self, index: int) -> StageStart:
        """Where stage `index` starts: the result of the one before it."""
        return StageStart() if index == 0 else StageStart.load(self.fetch(f"stages/{index - 1}"))


def job_uri(job: JobConfig) -> str:
    """The job's folder in storage, absolute, so that it means the same in every process."""
    return open_store(job.storage.uri, job.storage.endpoint, job.storage.region).join(job.name).uri


def unfinished_run(job: JobConfig) -> RunStore | None:
    """The latest run of an equal job that has no artifact yet.

    Raises:
        StorageError: the storage can't be read.
    """
    uri = job_uri(job)
    for run in sorted(open_store(uri).join("runs").folders(), reverse=True):
        found = RunStore(uri, run)
        record = found.read_record()
        if record is not None and not record.finished and record.digest == job.digest():
            return found
    return None


def here(base_dir: str) -> Path:
    """The job's folder on this node: where it is on the driver, else this process's copy of the working directory."""
    folder = Path(base_dir)
    return folder if folder.is_dir() else Path.cwd()


def _local(source: Store) -> Path:
    if source.is_local:
        return Path(source.path)
    folder = Path(tempfile.mkdtemp(prefix="raycomp-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in source.files():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes(file))
    return folder
