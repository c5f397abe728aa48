"""Where a run keeps its files in storage: `<storage>/<job>/{runs,train,artifacts}/<run>`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter

from raycomp.config import JobConfig
from raycomp.distributed.records import read_record, write_record
from raycomp.errors import ArtifactError, StorageError
from raycomp.pipeline.stage import StageStart
from raycomp.pipeline.training.checkpoint import StageState, epochs_done
from raycomp.storage import Store, open_store, scratch
from raycomp.storage.digest import file_digest
from raycomp.storage.explain import explained
from raycomp.storage.upload import upload_file

_RECORD = "run.json"
_AWAY_LOOKS, _LOOK_S = 30, 1.0
KEPT_CHECKPOINTS = 2
"""Of a stage: the second serves where the first is damaged."""
_CHECKPOINT = "checkpoint_"  # as Ray Train names them, with the time behind it
_DIGESTS = ".sha256.json"
_DIGESTS_ADAPTER = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run besides its checkpoints.

    Args:
        run: its id.
        digest: the job's, of what decides its result.
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
        """The run's record; None where it has none yet. Errors as in `records.read_record`."""
        return read_record(self.files, _RECORD, _ADAPTER)

    def write_record(self, record: RunRecord) -> None:
        """Stores the record."""
        write_record(self.files, _RECORD, _ADAPTER, record)

    def require(self) -> None:
        """Comes before anything is stored later than the record: storage that is away must not be made anew.

        Raises:
            StorageError: the run's record is not there, nor comes back while it is waited for.
        """
        for _ in range(_AWAY_LOOKS):
            if self.files.exists(_RECORD):
                return
            time.sleep(_LOOK_S)
        message = "the storage is away, or not the one that the run began with: its record is not there"
        raise StorageError(
            message, where=self.files.uri, remedy="bring it back, and run again with --resume", passing=True
        )

    def upload(self, name: str, folder: Path) -> None:
        """Stores a folder's files below the run's, and behind them their digests."""
        digests = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            file = path.relative_to(folder).as_posix()
            digests[file] = upload_file(path, self.files, f"{name}/{file}").sha256
        write_record(self.files, f"{name}{_DIGESTS}", _DIGESTS_ADAPTER, digests)

    def fetch(self, name: str, folder: Path) -> Path:
        """A folder that was uploaded, on this machine: itself, or a copy below `folder`.

        Raises:
            ArtifactError: it is not what was uploaded.
        """
        digests = read_record(self.files, f"{name}{_DIGESTS}", _DIGESTS_ADAPTER)
        if digests is None:
            raise ArtifactError("it was not stored whole", where=self.files.join(name).uri)
        found = _local(self.files.join(name), folder)
        for file, digest in digests.items():
            path = found / file
            actual = file_digest(path) if path.is_file() else None
            if actual != digest:
                fault = "is missing" if actual is None else "has another digest than when it was stored"
                raise ArtifactError(f"it is damaged: {file} {fault}", where=self.files.join(name).uri)
        return found

    def fetch_prepared(self, folder: Path) -> Path | None:
        """What the task's `prepare` wrote, as `fetch` gives it; None where it wrote nothing."""
        record = self.read_record()
        if record is None or not record.prepared:
            return None
        try:
            return self.fetch("prepared", folder)
        except ArtifactError as error:
            error.remedy = "put the file back, or begin a new run: without --resume"
            raise

    def whole_stages(self, count: int) -> tuple[int, str]:
        """How many of the first `count` stages have a stored result that is whole, and what is wrong with the next."""
        for index in range(count):
            try:
                with scratch() as folder:
                    self.fetch(f"stages/{index}", folder)
            except ArtifactError as error:
                return index, str(error)
        return count, ""

    def fetch_start(self, index: int) -> StageStart:
        """Where stage `index` starts: the result of the one before it."""
        if index == 0:
            return StageStart()
        with scratch() as folder:
            return StageStart.load(self.fetch(f"stages/{index - 1}", folder))

    def last_state(self, stage: str) -> tuple[StageState | None, tuple[str, ...]]:
        """Where a stage's training stands: its furthest checkpoint that is whole, and what to say of damaged ones.

        Checkpoints are looked for in storage, not in Ray's list of them, so that every process finds the same, whatever
        Ray got to know of it. How far they are is what they say: the time in their names is that of any machine.
        """
        place, damaged = self.train.join(stage), list[str]()
        for name in _furthest_first(place):
            with scratch() as folder:
                try:
                    state = StageState.load(_local(place.join(name), folder))
                except ArtifactError as error:
                    damaged.append(f"stage {stage}: {name} was passed over: {error.message}")
                    continue
            return replace(state, notes=(*state.notes, *damaged)), tuple(damaged)
        return None, tuple(damaged)

    def forget_superseded(self, stage: str) -> None:
        """Removes a stage's checkpoints behind the furthest that is whole and the one before it.

        Ray keeps as many of each run, and knows none of those that a run has gone on from. That one can't be removed
        harms nothing.
        """
        place = self.train.join(stage)
        names = _furthest_first(place)
        if len(names) <= KEPT_CHECKPOINTS:
            return
        whole = next((at for at, name in enumerate(names) if _is_whole(place.join(name))), len(names))
        for name in names[whole + KEPT_CHECKPOINTS :]:
            with contextlib.suppress(StorageError):
                place.delete_dir(name)


def _furthest_first(place: Store) -> list[str]:
    """The names of a stage's checkpoints."""
    names = [name for name in place.folders() if name.startswith(_CHECKPOINT)]
    return sorted(names, key=lambda each: (_epochs_done(place.join(each)), each), reverse=True)


def _is_whole(checkpoint: Store) -> bool:
    with scratch() as folder:
        try:
            StageState.load(_local(checkpoint, folder))
        except ArtifactError:
            return False
    return True


def job_uri(job: JobConfig) -> str:
    """The job's folder in storage, absolute, so that it means the same in every process."""
    return open_store(job.storage.uri, job.storage.endpoint, job.storage.region).join(job.name).uri


def unfinished_run(job: JobConfig, tell: Callable[[str], None]) -> RunStore | None:
    """The latest run of the same result that has no artifact yet.

    Args:
        job: what is to be done.
        tell: hears of runs that nobody can go on with, because their records are damaged.

    Raises:
        StorageError: the storage can't be read.
    """
    uri = job_uri(job)
    for run in sorted(open_store(uri).join("runs").folders(), reverse=True):
        found = RunStore(uri, run)
        try:
            record = found.read_record()
        except ArtifactError as error:
            tell(f"run {run} can't be resumed: {error}")
            continue
        if record is not None and not record.finished and record.digest == job.result_digest():
            return found
    return None


def _epochs_done(checkpoint: Store) -> float:
    """Of one that can't say it, infinitely many: it is looked at first, and found damaged."""
    try:
        return epochs_done(checkpoint)
    except ArtifactError:
        return math.inf


def _local(source: Store, folder: Path) -> Path:
    if source.is_local:
        return Path(source.path)
    for file in source.files():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with explained(str(path)):
            path.write_bytes(source.read_bytes(file))
    return folder
