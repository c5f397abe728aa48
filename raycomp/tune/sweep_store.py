"""Where a sweep keeps its files: `<storage>/<job>/sweeps/<id>/`, its trials' jobs below it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from pydantic import TypeAdapter

from raycomp.config import JobConfig, StorageConfig
from raycomp.config.sweep_plan import SweepPlan, Trial
from raycomp.distributed.run_store import job_uri
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
        return open_store(self.uri)

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
        """The sweep's record; None where there is none."""
        if not self.store.exists(_RECORD):
            return None
        return _RECORD_ADAPTER.validate_json(self.store.read_bytes(_RECORD))

    def write_record(self, record: SweepRecord) -> None:
        """Stores the record."""
        self.store.write_bytes(_RECORD, _RECORD_ADAPTER.dump_json(record, indent=1))

    def read_row(self, trial: str) -> TrialFigures | None:
        """What came of a trial; None while it hasn't ended."""
        name = f"rows/{trial}.json"
        return _ROW_ADAPTER.validate_json(self.store.read_bytes(name)) if self.store.exists(name) else None

    def write_row(self, row: TrialFigures) -> None:
        """Stores what came of a trial."""
        self.store.write_bytes(f"rows/{row.trial}.json", _ROW_ADAPTER.dump_json(row, indent=1))

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
        """The trials that have ended well."""
        rows = (self.read_row(trial) for trial in trials)
        return {row.trial for row in rows if row is not None and not row.error}


def sweeps_of(job: JobConfig) -> Store:
    """Where the sweeps over a job are."""
    return open_store(job_uri(job)).join("sweeps")


def unfinished_sweep(plan: SweepPlan) -> SweepStore | None:
    """The latest equal sweep, some trial of which hasn't ended well.

    Raises:
        StorageError: the storage can't be read.
    """
    sweeps = sweeps_of(plan.job)
    for sweep in sorted(sweeps.folders(), reverse=True):
        found = SweepStore(sweeps.join(sweep).uri)
        record = found.read_record()
        if record is not None and record.digest == plan.digest() and found.done(record.trials) < set(record.trials):
            return found
    return None
