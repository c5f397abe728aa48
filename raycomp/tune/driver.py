"""A sweep on the driver: trials through Ray Tune, their rows, the Pareto front and the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial

from raycomp.config import nearest
from raycomp.config.sweep import SweepConfig
from raycomp.config.sweep_plan import SweepPlan, load_sweep, parse_sweep
from raycomp.distributed.cluster import Cluster, connect, on_demand
from raycomp.distributed.interrupt import interruptible, told
from raycomp.distributed.job import CompressionJob
from raycomp.distributed.lease import lease
from raycomp.distributed.progress import Progress, shown
from raycomp.distributed.ray_data import data_cpus, ray_datasets
from raycomp.distributed.task_recipe import TaskRecipe, task_entry
from raycomp.errors import ClusterError, ConfigError, Problem
from raycomp.pipeline.task import Task, data_made_once
from raycomp.report import render_sweep, sweep_table
from raycomp.report.table import SweepTable
from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import RunSummary, TrialFigures
from raycomp.storage import open_artifact, scratch
from raycomp.tune.events import TrialEvents, Unheard
from raycomp.tune.front import with_front
from raycomp.tune.resources import TRIAL_RESOURCES, largest, trials_at_once
from raycomp.tune.sweep_store import REPORT, SweepRecord, SweepStore, sweeps_of, unfinished_sweep
from raycomp.tune.trial import TrialOrder, run_trial

_UNFINISHED = "it hasn't ended; resume goes on with it"
# The user's relative paths mean the same in a trial as in a job; an interrupt ends a sweep as it ends a job.
_TUNE_SETTINGS = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"}


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    Args:
        name: the job's name.
        sweep: the sweep's id.
        metric: the metric that was compared.
        mode: whether more or less of it is better.
        rows: all trials, in the order of the search space.
        uri: the sweep's folder in storage.
        report_path: the HTML report: a path where the storage is a folder, else its URI.
    """

    name: str
    sweep: str
    metric: str
    mode: Literal["max", "min"]
    rows: tuple[TrialFigures, ...] = field(repr=False)
    uri: str
    report_path: str

    @property
    def front(self) -> tuple[TrialFigures, ...]:
        """The trials on the Pareto front of metric against MACs, the fewest MACs first."""
        return tuple(sorted((row for row in self.rows if row.on_front), key=lambda row: row.macs or 0))

    @property
    def failed(self) -> tuple[TrialFigures, ...]:
        """The trials that ended without a model, or without its metric."""
        return tuple(row for row in self.rows if row.error)

    def table(self) -> SweepTable:
        """All trials, the best first, and their artifacts, for a notebook or `print`."""
        return sweep_table(self.rows, self.metric, self.mode)


def sweep(
    config: SweepConfig | Mapping[str, Any] | str | Path,
    base_dir: str | Path | None = None,
    *,
    task: Task | type[Task] | None = None,
    resume: bool = False,
    progress: Progress | Callable[[str | ProgressEvent], None] | None = None,
    resume_with: str = "sweep(resume=True)",
) -> SweepResult:
    """Runs a job at every point of a search space, each a distributed job with its own artifact.

    Args:
        config: a sweep file's path, a `SweepConfig`, or a mapping of the same keys.
        base_dir: for settings that aren't a file: what the job's path is relative to; default the current folder.
        task: instead of the job's own, as in `CompressionJob`.
        resume: go on with the latest equal sweep that has unfinished or failed trials, where there is one. Trials that
            ended well are kept, others go on from their last checkpoint.
        progress: hears when trials begin and end; as in `CompressionJob.fit`.
        resume_with: what to tell who interrupts the sweep, as the way to go on with it.

    Raises:
        ConfigError, TaskError, StorageError: before the cluster is asked for anything.
        ClusterError: Ray can't be reached, or has not what a trial needs. A trial that fails is no error of the sweep.
    """
    entry = None if task is None else task_entry(task)
    if isinstance(config, str | Path):
        plan = load_sweep(config, entry)
    else:
        plan = parse_sweep(config, base_dir or ".", entry)
    recipe = TaskRecipe.of(plan.base_dir, task)
    with shown(progress) as listener, ExitStack() as stack:
        stack.enter_context(interruptible())
        running = _Sweep(plan, recipe, listener, stack)
        with told(listener.message, running.state, resume_with):
            return running.run(resume)


class _Sweep:
    """One sweep, on the driver.

    Args:
        plan: its trials.
        recipe: makes the task.
        progress: hears what happens.
        stack: ends what the sweep has begun.
    """

    def __init__(self, plan: SweepPlan, recipe: TaskRecipe, progress: Progress, stack: ExitStack) -> None:
        self.plan, self.recipe, self.progress, self._stack = plan, recipe, progress, stack
        self.ended = set[str]()
        self._cluster: Cluster | None = None
        self._data_cpus = 0.0

    def state(self) -> str:
        """What has ended, for who interrupts the sweep."""
        return f"{len(self.ended)} of {len(self.plan.trials)} trials have ended"

    def run(self, resume: bool) -> SweepResult:
        self._check()
        self._begin(resume)
        with lease(self.sweep_store.store, self.progress.message):
            return self._run()

    def _run(self) -> SweepResult:
        trials = {trial.id: trial for trial in self.plan.trials}
        self.ended = self.sweep_store.done(tuple(trials))
        todo = sorted(trials.keys() - self.ended)
        self.sweep_store.forget(todo)
        jobs = {name: self.sweep_store.job_of(trials[name]) for name in todo}
        orders = {
            name: TrialOrder(name, trials[name].settings, job, self.recipe, self.plan.config.metric, self.sweep_store)
            for name, job in jobs.items()
        }
        for name, value in _TUNE_SETTINGS.items():
            os.environ.setdefault(name, value)
        return self._finish(self._tune(orders, self._connected()))

    def _check(self) -> None:
        """The first trial's job is one that can run, and its task gives the metric that is compared."""
        self.progress.message(f"sweep of {self.plan.job.name}: checking the first trial's job and its task")
        job = CompressionJob(self.plan.trials[0].job, self.plan.base_dir, task=self.recipe.given())
        with scratch() as folder, on_demand(lambda: self._connected(for_data=True)), data_made_once():
            task, checked = job.checked(folder)
            self._data_cpus = data_cpus(ray_datasets(task).values())
        wanted = self.plan.config.metric
        if wanted is not None and checked.metrics and wanted not in checked.metrics:
            raise ConfigError([Problem("metric", f"the task gives no {wanted!r}", nearest(wanted, checked.metrics))])

    def _connected(self, *, for_data: bool = False) -> Cluster:
        if self._cluster is None:
            needed = largest(trial.job for trial in self.plan.trials)
            connected = connect(needed, self.progress.message, for_data=for_data)
            self._cluster = self._stack.enter_context(connected)
        return self._cluster

    def _begin(self, resume: bool) -> None:
        plan = self.plan
        found = unfinished_sweep(plan, self.progress.message) if resume else None
        if found is not None:
            self.sweep_store, self.record = found
            self.progress.message(f"resuming sweep {self.record.sweep}")
            return
        if resume:
            self.progress.message("there is no unfinished sweep like this one: a new one begins")
        now = datetime.now(UTC)
        sweep_id = f"{now:%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"
        self.sweep_store = SweepStore(sweeps_of(plan.job).join(sweep_id).uri)
        trials = tuple(trial.id for trial in plan.trials)
        self.record = SweepRecord(sweep_id, plan.digest(), now.isoformat(timespec="seconds"), trials)
        self.sweep_store.write_record(self.record)

    def _tune(self, orders: Mapping[str, TrialOrder], cluster: Cluster) -> dict[str, str]:
        """Runs the trials; the causes of those that Ray Tune lost."""
        jobs = [order.job for order in orders.values()]
        resources = dict(ray.cluster_resources())
        if not self._data_cpus:
            resources["CPU"] -= cluster.spare_cpus
        fitting = trials_at_once(jobs, resources, use_gpu=cluster.use_gpu, data_cpus=self._data_cpus)
        # Workers of more trials than fit would take the CPUs that the data of the others wait for.
        most = fitting if self._data_cpus else len(orders)
        at_once = min(self.plan.config.max_concurrent_trials or fitting, most, len(orders))
        count = f"{len(orders)} trial{'s' * (len(orders) != 1)}, {at_once} at once"
        self.progress.message(f"sweep {self.record.sweep} of {self.plan.job.name}: {count}, on {cluster.description}")
        events = TrialEvents(self.progress, self.ended)
        points = [{"id": name, "settings": order.settings} for name, order in orders.items()]
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, orders=dict(orders)), tune.PlacementGroupFactory([TRIAL_RESOURCES])
            ),
            param_space={"trial": tune.grid_search(points)},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once, trial_name_creator=_trial_name, trial_dirname_creator=_trial_name
            ),
            run_config=tune.RunConfig(
                name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}",
                storage_path=self.sweep_store.tune_uri,
                failure_config=tune.FailureConfig(max_failures=self.plan.job.scaling.max_failures),
                callbacks=[events],
                progress_reporter=Unheard(),
                verbose=0,
            ),
        )
        try:
            with _keys_kept():
                tuner.fit()
        except (tune.TuneError, ray.exceptions.RayError) as error:
            raise ClusterError(
                f"the sweep broke off: {error}", where=self.sweep_store.uri, remedy=_UNFINISHED
            ) from error
        return events.lost

    def _finish(self, lost: Mapping[str, str]) -> SweepResult:
        config, sweep_store = self.plan.config, self.sweep_store
        rows = tuple(
            sweep_store.read_row(trial.id)
            or TrialFigures(trial.id, trial.settings, None, None, error=lost.get(trial.id, _UNFINISHED))
            for trial in self.plan.trials
        )
        rows = with_front(rows, config.mode)
        metric = self._metric(rows)
        sweep_store.write_result(rows, render_sweep(self.plan.job.name, rows, metric, config.mode))
        report = sweep_store.store.join(REPORT)
        return SweepResult(
            self.plan.job.name,
            self.record.sweep,
            metric,
            config.mode,
            rows,
            sweep_store.uri,
            report.path if report.is_local else report.uri,
        )

    def _metric(self, rows: tuple[TrialFigures, ...]) -> str:
        """The metric's name: the one that was asked for, else the first that any artifact names."""
        if self.plan.config.metric is not None:
            return self.plan.config.metric
        for row in rows:
            if row.artifact_uri:
                manifest = open_artifact(row.artifact_uri).manifest
                found = RunSummary.from_figures(
                    manifest.figures, job=manifest.job, run=manifest.run, created=manifest.created
                )
                return next(iter(found.models[-1].metrics))
        return "metric"


@contextmanager
def _keys_kept() -> Iterator[None]:
    """Within the block, Ray Tune sends trials no keys of AWS in a runtime environment, which Ray logs.

    They have those that `connect` gave them, or inherit the driver's.
    """
    before = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in before if not name.startswith("AWS_")}
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = before


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.config['trial']['id']}"
