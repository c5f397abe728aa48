"""Where a sweep keeps its files: `<storage>/<job>/sweeps/<id>/`, its trials' jobs below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from pydantic import TypeAdapter

from raycomp.config import JobConfig, StorageConfig
from raycomp.config.sweep_plan import SweepPlan, Trial
from raycomp.distributed.records import read_record, write_record
from raycomp.distributed.run_store import job_uri
from raycomp.errors import ArtifactError
from raycomp.results.summary import TrialFigures
from raycomp.storage import Store, open_store

_RECORD = "sweep.json"
_ROWS = "trials.json"
REPORT = "report.html"
_NAME_LENGTH = 63


@dataclass(frozen=True)
class SweepRecord:
    """What is known of a sweep besides its trials.

    Args:
        sweep: its id.
        digest: the plan's.
        created: UTC time, ISO 8601.
        trials: the trials' ids.
    """

    sweep: str
    digest: str
    created: str
    trials: tuple[str, ...]


_RECORD_ADAPTER = TypeAdapter(SweepRecord)
_ROW_ADAPTER = TypeAdapter(TrialFigures)
_ROWS_ADAPTER = TypeAdapter(tuple[TrialFigures, ...])


@dataclass(frozen=True)
class SweepStore:
    """One sweep's place in its job's storage. Small enough to send to trials: it holds no secrets and no connection.

    Args:
        uri: the sweep's folder in storage, absolute, with the store's options.
    """

    uri: str

    @cached_property
    def store(self) -> Store:
        """The sweep's folder in storage."""
        return open_store(self.uri).patient()

    @property
    def tune_uri(self) -> str:
        """Where Ray Tune keeps its own files."""
        folder = self.store.join("tune")
        return folder.path if folder.is_local else folder.uri

    def job_of(self, trial: Trial) -> JobConfig:
        """The trial's job, with a name and a place of its own, so that no trial meets another's runs."""
        suffix = f"-{trial.id}"
        name = trial.job.name[: _NAME_LENGTH - len(suffix)] + suffix
        storage = StorageConfig(uri=self.store.join("jobs").uri)
        return trial.job.model_copy(update={"name": name, "storage": storage})

    def read_record(self) -> SweepRecord | None:
        """The sweep's record; None where there is none. Errors as in `records.read_record`."""
        return read_record(self.store, _RECORD, _RECORD_ADAPTER)

    def write_record(self, record: SweepRecord) -> None:
        """Stores the record."""
        write_record(self.store, _RECORD, _RECORD_ADAPTER, record)

    def read_row(self, trial: str) -> TrialFigures | None:
        """What came of a trial; None while it hasn't ended. Errors as in `records.read_record`."""
        return read_record(self.store, f"rows/{trial}.json", _ROW_ADAPTER)

    def write_row(self, row: TrialFigures) -> None:
        """Stores what came of a trial."""
        write_record(self.store, f"rows/{row.trial}.json", _ROW_ADAPTER, row)

    def write_result(self, rows: tuple[TrialFigures, ...], report: str) -> None:
        """Stores the whole table, and the report."""
        self.store.write_bytes(_ROWS, _ROWS_ADAPTER.dump_json(rows, indent=1))
        self.store.write_bytes(REPORT, report.encode())

    def forget(self, trials: Iterable[str]) -> None:
        """Deletes what was known of trials that are run again."""
        for trial in trials:
            if self.store.exists(f"rows/{trial}.json"):
                self.store.delete(f"rows/{trial}.json")

    def done(self, trials: tuple[str, ...]) -> set[str]:
        """The trials that have ended well, and whose rows say so: a damaged one says nothing."""
        return {trial for trial in trials if self._ended_well(trial)}

    def _ended_well(self, trial: str) -> bool:
        try:
            row = self.read_row(trial)
        except ArtifactError:
            return False
        return row is not None and not row.error


def sweeps_of(job: JobConfig) -> Store:
    """Where the sweeps over a job are."""
    return open_store(job_uri(job)).join("sweeps")


def unfinished_sweep(plan: SweepPlan, tell: Callable[[str], None]) -> tuple[SweepStore, SweepRecord] | None:
    """The latest equal sweep, some trial of which hasn't ended well.

    Args:
        plan: what is to be done.
        tell: hears of sweeps that nobody can go on with, because their records are damaged.

    Raises:
        StorageError: the storage can't be read.
    """
    sweeps = sweeps_of(plan.job)
    for sweep in sorted(sweeps.folders(), reverse=True):
        found = SweepStore(sweeps.join(sweep).uri)
        try:
            record = found.read_record()
        except ArtifactError as error:
            tell(f"sweep {sweep} can't be resumed: {error}")
            continue
        if record is not None and record.digest == plan.digest() and found.done(record.trials) < set(record.trials):
            return found, record
    return None
