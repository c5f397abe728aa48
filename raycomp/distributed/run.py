"""A job on its driver: from the checked task over each stage's training to the published artifact."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import ray.data
from ray.actor import ActorHandle

from raycomp.config import JobConfig
from raycomp.core.masks import Masks
from raycomp.core.moments import Calibration
from raycomp.distributed.cluster import Cluster, connect, on_demand, on_head
from raycomp.distributed.head import HeadOrder, end_stage, publish_run, resolve_next
from raycomp.distributed.interrupt import interruptible, told
from raycomp.distributed.lease import Lease, lease
from raycomp.distributed.progress import Progress
from raycomp.distributed.ray_data import data_cpus, ray_datasets
from raycomp.distributed.run_store import RunRecord, RunStore, job_uri, unfinished_run
from raycomp.distributed.search import SearchOrder, settle
from raycomp.distributed.task_recipe import TaskRecipe
from raycomp.distributed.trainer import progress_sink, train_stage
from raycomp.distributed.worker import Saved, WorkerOrder
from raycomp.pipeline.build import ResolvedStage
from raycomp.pipeline.earlier import kept_for_the_ending
from raycomp.pipeline.ending.artifact import REPORT
from raycomp.pipeline.ending.conclude import RunFacts, Stopwatch
from raycomp.pipeline.latency import timed_budgets
from raycomp.pipeline.preflight import Checked
from raycomp.pipeline.search import searches
from raycomp.pipeline.task import Task, data_made_once
from raycomp.report import text
from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import RunSummary
from raycomp.storage import scratch


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
        """{form: metrics}; the forms are those of `raycomp.results.summary.FORMS` that the run made."""
        return {row.name: row.metrics for row in self.summary.models}


@dataclass
class _Listener:
    """Hands the news of training on, and keeps what is to be said of the run.

    Args:
        progress: who shows it.
        notes: what was told besides events, for the report.
        last: the newest checkpoint.
    """

    progress: Progress
    notes: list[str] = field(default_factory=list)
    last: Saved | None = None

    def tell(self, line: str) -> None:
        """A part of the run begins."""
        self.progress.message(line)

    def message(self, line: str) -> None:
        """Something happened that the report should say, too."""
        self.notes.append(line)
        self.tell(line)

    def event(self, event: ProgressEvent) -> None:
        self.progress.event(event)

    def saved(self, checkpoint: Saved) -> None:
        self.last = checkpoint


@dataclass(frozen=True)
class _Work:
    """What is to be done, whichever run it becomes.

    Args:
        config: the job.
        recipe: makes its task.
        listener: hears what happens.
        callbacks: Ray Train callbacks for every stage's run.
        watch: where the time goes.
    """

    config: JobConfig
    recipe: TaskRecipe
    listener: _Listener
    callbacks: list[Any]
    watch: Stopwatch


class Driver:
    """Brings a job to its run: its task is checked, Ray connected, the run found or begun, and held against others.

    Args:
        config: the job.
        recipe: makes its task.
        progress: hears what happens.
        callbacks: Ray Train callbacks for every stage's run.
        stack: ends what the driver has begun.
    """

    def __init__(
        self, config: JobConfig, recipe: TaskRecipe, progress: Progress, callbacks: list[Any], stack: ExitStack
    ) -> None:
        self._config, self._progress, self._stack = config, progress, stack
        self._work = _Work(config, recipe, _Listener(progress), callbacks, Stopwatch())
        self._cluster: Cluster | None = None
        self._run: _Run | None = None

    def fit(self, check: Callable[[Path], tuple[Task, Checked]], resume: bool, resume_with: str) -> JobResult:
        """Runs the job; the arguments and errors are those of `CompressionJob.fit`.

        Args:
            check: prepares the task in a folder, and finds it to fit the job.
            resume: whether to go on with an unfinished run.
            resume_with: what to tell who interrupts it.
        """
        self._stack.enter_context(interruptible())
        self._stack.enter_context(kept_for_the_ending())
        with told(self._progress.message, self._state, resume_with):
            return self._fit(check, resume)

    def _state(self) -> str:
        return "before a run began" if self._run is None else self._run.state()

    def _fit(self, check: Callable[[Path], tuple[Task, Checked]], resume: bool) -> JobResult:
        prepared = self._stack.enter_context(scratch())
        for_data = on_demand(lambda: self._connected(for_data=True))
        with self._work.watch.part("validate and prepare"), for_data, data_made_once():
            self._progress.message(f"job {self._config.name}: checking the job, its task and its storage")
            task, checked = check(prepared)
            for warning in checked.warnings:
                self._progress.message(warning)
            datasets = ray_datasets(task)
        with self._work.watch.part("start Ray"):
            cluster = self._connected()
        wait_s = self._config.cluster.wait_s
        cluster.require_data_cpus(self._config.scaling, data_cpus(datasets.values()), wait_s, self._progress.message)
        self._run = self._begun(resume, prepared, cluster, datasets)
        self._progress.message(f"run {self._run.run_store.run} on {cluster.description}")
        return self._run.to_its_end(checked.first, self._stack.enter_context(progress_sink(self._work.listener)))

    def _connected(self, *, for_data: bool = False) -> Cluster:
        if self._cluster is None:
            connected = connect(self._config, self._progress.message, for_data=for_data)
            self._cluster = self._stack.enter_context(connected)
        return self._cluster

    def _begun(self, resume: bool, prepared: Path, cluster: Cluster, datasets: dict[str, ray.data.Dataset]) -> _Run:
        now = datetime.now(UTC)
        name = f"{now:%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"
        run_store = self._found(resume) or RunStore(job_uri(self._config), name)
        held = self._stack.enter_context(lease(run_store.files, self._progress.message))
        # Who held it until now may have gone on.
        record = run_store.read_record() or _stored(self._config, run_store, prepared, now)
        return _Run(self._work, cluster, datasets, run_store, record, held)

    def _found(self, resume: bool) -> RunStore | None:
        found = unfinished_run(self._config, self._progress.message)
        if found is not None and resume:
            self._progress.message(f"resuming run {found.run}")
            return found
        if found is not None:
            self._progress.message(f"run {found.run} of this job is unfinished; --resume would go on with it")
        elif resume:
            self._progress.message("no unfinished run has this job and these settings: a new one begins")
        return None


def _stored(config: JobConfig, run_store: RunStore, prepared: Path, now: datetime) -> RunRecord:
    """A new run's record, stored behind what its workers need."""
    has_files = any(path.is_file() for path in prepared.rglob("*"))
    if has_files:
        run_store.upload("prepared", prepared)
    created = now.isoformat(timespec="seconds")
    record = RunRecord(run_store.run, config.result_digest(), config.to_yaml(), created, prepared=has_files)
    run_store.write_record(record)
    return record


@dataclass
class _Run:
    """A run that this driver holds.

    Args:
        work: what is to be done.
        cluster: where it runs.
        datasets: what Ray Train shards.
        run_store: where the run's files are.
        record: what is known of it.
        lease: holds it against others.
    """

    work: _Work
    cluster: Cluster
    datasets: dict[str, ray.data.Dataset]
    run_store: RunStore
    record: RunRecord
    lease: Lease
    started: float = field(default_factory=time.time)

    def to_its_end(self, resolved: ResolvedStage, sink: ActorHandle) -> JobResult:
        """Trains the stages that are not done, and publishes.

        Args:
            resolved: what the first stage's config lists mean.
            sink: the actor that hears of progress.
        """
        last = len(self.work.config.stages) - 1
        for index in range(self._first_to_do(), last + 1):
            if index:
                resolved = on_head(resolve_next, self.work.config, self.work.recipe, self.run_store, index)
            resolved = self._settled(index, resolved)
            self._train(index, resolved, sink)
            notes = tuple(self.work.listener.notes)
            order = HeadOrder(self.work.config, self.work.recipe, self.run_store, resolved, index, notes)
            if index < last:
                self._end_stage(order)
        return self._publish(order)

    def state(self) -> str:
        """What is saved, for who interrupts the run."""
        saved = self.work.listener.last
        if saved is None:
            return f"run {self.run_store.run} has no checkpoint yet"
        return f"run {self.run_store.run} is saved up to epoch {saved.epoch} of stage {saved.stage}"

    def _first_to_do(self) -> int:
        whole, damage = self.run_store.whole_stages(self.record.stages_done)
        if damage:
            name = self.work.config.stages[whole].name
            self.work.listener.message(f"stage {name} is finished anew from its last checkpoint: {damage}")
        return whole

    def _record(self, record: RunRecord) -> None:
        self._check()
        self.record = record
        self.run_store.write_record(record)

    def _check(self) -> None:
        """Comes before anything is stored: the storage is there, and the run is in this process's hands."""
        self.run_store.require()
        self.lease.check()

    def _settled(self, index: int, resolved: ResolvedStage) -> ResolvedStage:
        """What the stage prunes by, once what has to be timed and searched for is."""
        if not timed_budgets(self.work.config, index) and not searches(self.work.config.stages[index]):
            return resolved
        order = SearchOrder(self.work.config, self.work.recipe, self.run_store, resolved, index)
        listener = self.work.listener
        with self.work.watch.part("search"):
            return settle(order, self.cluster, listener.tell, listener.message)

    def _train(self, index: int, resolved: ResolvedStage, sink: ActorHandle) -> None:
        stage = self.work.config.stages[index]
        names = " + ".join(settings.type for settings in stage.compressors)
        self.work.listener.tell(f"stage {stage.name}: {names} on {text.workers(self.work.config.scaling.num_workers)}")
        state, damaged = self.run_store.last_state(stage.name)
        for note in damaged:
            self.work.listener.message(note)
        if state is not None:
            self.work.listener.saved(Saved(stage.name, state.epoch))
        order = WorkerOrder(self.work.config, index, self.run_store, resolved, self.work.recipe, sink, self.started)
        with self.work.watch.part("train"):
            self.run_store.forget_superseded(stage.name)
            train_stage(order, self.cluster, self.datasets, self.work.callbacks)
            self.run_store.forget_superseded(stage.name)

    def _end_stage(self, order: HeadOrder) -> None:
        name = self.work.config.stages[order.index].name
        self.work.listener.tell(f"stage {name}: speedup and verification on the head node")
        self._check()
        with self.work.watch.part("speed up and verify"):
            on_head(end_stage, order)
        self._record(replace(self.record, stages_done=order.index + 1))

    def _publish(self, order: HeadOrder) -> JobResult:
        self.work.listener.tell("speedup, verification, int8, measuring and publishing on the head node")
        uri = self.run_store.artifact_uri
        environment = {"ray": ray.__version__, "cluster": self.cluster.description}
        environment["workers"] = str(self.work.config.scaling.num_workers)
        facts = RunFacts(self.run_store.run, self.record.created, uri, environment, self.work.watch.timings)
        self._check()
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
