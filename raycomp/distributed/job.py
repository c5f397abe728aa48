"""CompressionJob: the driver's way from a job's settings to a published artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from rich.console import Console

from raycomp.config import JobConfig, SourceMap, load_job_file, parse_job
from raycomp.core.masks import Masks
from raycomp.core.moments import Calibration
from raycomp.distributed.cluster import connect
from raycomp.distributed.head import HeadOrder, end_stage, on_head, publish_run, resolve_next
from raycomp.distributed.lease import lease
from raycomp.distributed.run_store import RunRecord, RunStore, job_uri, unfinished_run
from raycomp.distributed.trainer import Progress, Silent, progress_sink, ray_datasets, train_stage
from raycomp.distributed.worker import WorkerOrder
from raycomp.errors import ConfigError
from raycomp.pipeline.build import ResolvedStage
from raycomp.pipeline.ending.artifact import REPORT
from raycomp.pipeline.ending.conclude import RunFacts, Stopwatch
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.preflight import Checked, check_stages
from raycomp.pipeline.task import Task, prepare_task
from raycomp.report import ProgressPrinter
from raycomp.report.text import workers
from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import RunSummary
from raycomp.storage import open_store, scratch


@dataclass(frozen=True)
class JobResult:
    """What a job gave.

    Args:
        summary: all figures.
        artifact_uri: where the artifact is; `raycomp.load(artifact_uri)` gives the model.
        report_path: the HTML report: a path where the storage is a folder, else its URI.
        masks: {module: {target: mask}} of all stages.
        calibration: {module: {target: {scale, zero_point, …}}} of the sped-up model.
    """

    summary: RunSummary
    artifact_uri: str
    report_path: str
    masks: Masks = field(repr=False)
    calibration: Calibration = field(repr=False)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """{form: metrics} for dense, simulated, sped-up and int8."""
        return {row.name: row.metrics for row in self.summary.models}


class CompressionJob:
    """A compression job.

    Args:
        config: a `JobConfig`, a mapping of the same keys, or the path of a job file.
        base_dir: what the task's path is relative to; default the job file's folder, else the current one.
        source: where the keys of a job that was read from a file are, so that errors name its lines.

    Raises:
        ConfigError: with everything that is wrong in the settings.
    """

    def __init__(
        self,
        config: JobConfig | Mapping[str, Any] | str | Path,
        base_dir: Path | str | None = None,
        source: SourceMap | None = None,
    ) -> None:
        if isinstance(config, str | Path):
            base_dir = base_dir or Path(config).resolve().parent
            file = load_job_file(config)
            config, source = file.job, file.source
        self.config = config if isinstance(config, JobConfig) else parse_job(config)
        self.base_dir = Path(base_dir or ".").resolve()
        self._source = source

    def validate(self) -> tuple[str, ...]:
        """Checks all that can be checked without a cluster: the task, its model, every selection, the storage.

        Returns:
            What the job's user should know before it runs: layers that will be masked and can't be cut.

        Raises:
            ConfigError, TaskError, StorageError: before anything has been started.
        """
        with scratch() as folder:
            return self.checked(folder)[1].warnings

    def checked(self, folder: Path) -> tuple[Task, Checked]:
        """The task, prepared in `folder` and found to fit the job; errors as in `validate`."""
        job = self.config
        open_store(job.storage.uri, job.storage.endpoint, job.storage.region).check()
        try:
            task = build_task(job.task, self.base_dir)
            prepare_task(task, folder)
            return task, check_stages(job, task)
        except ConfigError as error:
            raise error if self._source is None else self._source.located(error) from None

    def fit(
        self,
        *,
        resume: bool = False,
        progress: Progress | Callable[[str | ProgressEvent], None] | None = None,
        callbacks: list[Any] | None = None,
    ) -> JobResult:
        """Runs the job to its published artifact.

        Args:
            resume: go on with the latest unfinished run of an equal job, where there is one.
            progress: hears what happens: a `Progress`, or any function of a line of text or a `ProgressEvent`. Without
                it a terminal or notebook shows the progress; elsewhere nothing is shown.
            callbacks: Ray Train callbacks for every stage's run.

        Raises:
            RaycompError: one error with its cause; nothing half-written stays in the artifacts' place.
        """
        with _shown(progress) as shown:
            return _Run(self, shown, callbacks or []).fit(resume)


@dataclass(frozen=True)
class _Told:
    """A function that hears all news."""

    tell: Callable[[str | ProgressEvent], None]

    def message(self, line: str) -> None:
        self.tell(line)

    def event(self, event: ProgressEvent) -> None:
        self.tell(event)


@contextmanager
def _shown(progress: Progress | Callable[[str | ProgressEvent], None] | None) -> Iterator[Progress]:
    console = Console(stderr=True)
    if progress is None and (console.is_terminal or console.is_jupyter):
        with ProgressPrinter(console) as printer:
            yield printer
    elif progress is None:
        yield Silent()
    else:
        yield progress if isinstance(progress, Progress) else _Told(progress)


@dataclass(frozen=True)
class _Listener:
    """Hands the news of training on, and keeps what the report should say.

    Args:
        progress: who shows it.
        notes: what was told besides events.
    """

    progress: Progress
    notes: list[str]

    def message(self, line: str) -> None:
        self.notes.append(line)
        self.progress.message(line)

    def event(self, event: ProgressEvent) -> None:
        self.progress.event(event)


class _Run:
    """One run of a job, on the driver."""

    def __init__(self, job: CompressionJob, progress: Progress, callbacks: list[Any]) -> None:
        self.job, self.config = job, job.config
        self.progress, self.callbacks = progress, callbacks
        self.watch = Stopwatch()
        self.created = datetime.now(UTC)
        self.listener = _Listener(progress, [])

    def fit(self, resume: bool) -> JobResult:
        with ExitStack() as stack:
            prepared = stack.enter_context(scratch())
            with self.watch.part("validate and prepare"):
                self.progress.message(f"job {self.config.name}: checking the job, its task and its storage")
                task, checked = self.job.checked(prepared)
                resolved = checked.first
                for warning in checked.warnings:
                    self.progress.message(warning)
                self.datasets = ray_datasets(task)
            with self.watch.part("start Ray"):
                self.cluster = stack.enter_context(connect(self.config, self.progress.message))
            found = self._begin(resume)
            self.lease = stack.enter_context(lease(self.run_store.files, self.progress.message))
            if not found:
                self._store_job(prepared)
            self.progress.message(f"run {self.run_store.run} on {self.cluster.description}")
            sink = stack.enter_context(progress_sink(self.listener))
            for index in range(self.record.stages_done, len(self.config.stages)):
                if index:
                    resolved = on_head(resolve_next, self.config, str(self.job.base_dir), self.run_store, index)
                self._train(index, resolved, sink)
                order = HeadOrder(
                    self.config, str(self.job.base_dir), self.run_store, resolved, index, tuple(self.listener.notes)
                )
                if index < len(self.config.stages) - 1:
                    self._end_stage(order)
            return self._publish(order)

    def _begin(self, resume: bool) -> bool:
        """Finds the run that goes on, or a name for a new one; returns whether it was found."""
        found = unfinished_run(self.config, self.progress.message)
        if found is not None and resume:
            self.run_store, self.record = found
            self.progress.message(f"resuming run {self.run_store.run}")
            return True
        if found is not None:
            self.progress.message(f"run {found[0].run} of this job is unfinished; --resume would go on with it")
        elif resume:
            self.progress.message("there is no unfinished run of this job: a new one begins")
        self.run_store = RunStore(job_uri(self.config), f"{self.created:%Y%m%d-%H%M%S}-{uuid4().hex[:6]}")
        return False

    def _store_job(self, prepared: Path) -> None:
        has_files = any(path.is_file() for path in prepared.rglob("*"))
        if has_files:
            self.run_store.upload("prepared", prepared)
        self._record(
            RunRecord(
                self.run_store.run,
                self.config.result_digest(),
                self.config.to_yaml(),
                self.created.isoformat(timespec="seconds"),
                prepared=has_files,
            )
        )

    def _record(self, record: RunRecord) -> None:
        self.lease.check()
        self.record = record
        self.run_store.write_record(record)

    def _train(self, index: int, resolved: ResolvedStage, sink: Any) -> None:
        stage = self.config.stages[index]
        names = " + ".join(settings.type for settings in stage.compressors)
        self.progress.message(f"stage {stage.name}: {names} on {workers(self.config.scaling.num_workers)}")
        _, damaged = self.run_store.last_state(stage.name)
        for note in damaged:
            self.listener.message(note)
        order = WorkerOrder(
            self.config, index, self.run_store, resolved, str(self.job.base_dir), sink, self.created.timestamp()
        )
        with self.watch.part("train"):
            train_stage(order, self.cluster, self.datasets, self.callbacks)

    def _end_stage(self, order: HeadOrder) -> None:
        self.progress.message(
            f"stage {self.config.stages[order.index].name}: speedup and verification on the head node"
        )
        with self.watch.part("speed up and verify"):
            on_head(end_stage, order)
        self._record(replace(self.record, stages_done=order.index + 1))

    def _publish(self, order: HeadOrder) -> JobResult:
        self.progress.message("speedup, verification, int8, measuring and publishing on the head node")
        uri = self.run_store.artifact_uri
        environment = {"ray": ray.__version__, "cluster": self.cluster.description}
        environment["workers"] = str(self.config.scaling.num_workers)
        facts = RunFacts(self.run_store.run, self.record.created, uri, environment, self.watch.timings)
        self.lease.check()
        conclusion = on_head(publish_run, order, facts)
        self._record(replace(self.record, finished=True))
        report = self.run_store.artifacts.join(self.run_store.run, REPORT)
        return JobResult(
            conclusion.summary,
            uri,
            report.path if report.is_local else report.uri,
            conclusion.masks,
            conclusion.calibration,
        )
