"""CompressionJob: a job's settings, checked, and the way to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from raycomp.config import JobConfig, SourceMap, load_job_file, parse_job
from raycomp.config.storage import deleted_by_ray
from raycomp.distributed.cluster import connect, has_other_files, on_demand
from raycomp.distributed.progress import Progress, shown
from raycomp.distributed.run import Driver, JobResult
from raycomp.distributed.task_recipe import TaskRecipe, task_entry
from raycomp.errors import ConfigError
from raycomp.pipeline.preflight import Checked, check_stages
from raycomp.pipeline.task import Task, prepare_task
from raycomp.results.progress import ProgressEvent
from raycomp.storage import open_store, scratch

_WORKING_DIR = "/runtime_resources/working_dir_files/"  # where Ray unpacks what was submitted
__all__ = ["CompressionJob", "JobResult"]


class CompressionJob:
    """A compression job.

    Args:
        config: a `JobConfig`, a mapping of the same keys, or the path of a job file.
        base_dir: what the task's path is relative to; default the job file's folder, else the current one.
        source: where the keys of a job that was read from a file are, so that errors name its lines.
        task: a `Task`, or its class, which is then called with the job's `task.arguments`; it stands instead of the
            job's own. As it is now, it goes to all workers: what is done to it later is not seen.

    Raises:
        ConfigError: with everything that is wrong in the settings.
        TaskError: what was given is no task.
    """

    def __init__(
        self,
        config: JobConfig | Mapping[str, Any] | str | Path,
        base_dir: Path | str | None = None,
        source: SourceMap | None = None,
        *,
        task: Task | type[Task] | None = None,
    ) -> None:
        entry = None if task is None else task_entry(task)
        if isinstance(config, str | Path):
            base_dir = base_dir or Path(config).resolve().parent
            file = load_job_file(config, entry)
            config, source = file.job, file.source
        elif entry is not None or not isinstance(config, JobConfig):
            config = parse_job(config, task=entry)
        self.config = config
        self.base_dir = Path(base_dir or ".").resolve()
        self._source = source
        self._recipe = TaskRecipe.of(self.base_dir, task)

    def validate(self) -> tuple[str, ...]:
        """Checks all that can be checked without a cluster: the task, its model, every selection, the storage.

        A task whose data is Ray Data's is checked on the job's Ray, for as long as that takes.

        Returns:
            What the job's user should know before it runs: layers that will be masked and can't be cut.

        Raises:
            ConfigError, TaskError, StorageError: before anything has been started.
        """
        with ExitStack() as stack, on_demand(lambda: stack.enter_context(connect(self.config, for_data=True))):
            return self.checked(stack.enter_context(scratch()))[1].warnings

    def checked(self, folder: Path) -> tuple[Task, Checked]:
        """The task, prepared in `folder` and found to fit the job; errors as in `validate`."""
        job = self.config
        store = open_store(job.storage.uri, job.storage.endpoint, job.storage.region)
        try:
            if store.is_local and _WORKING_DIR in store.path:
                raise ConfigError([deleted_by_ray("storage.uri", job.storage.uri)])
            store.check()
            task = self._recipe.make(job.task)
            prepare_task(task, folder)
            return task, self._checked(task)
        except ConfigError as error:
            raise error if self._source is None else self._source.located(error) from None

    def _checked(self, task: Task) -> Checked:
        checked = check_stages(self.config, task)
        absent = self._recipe.left_behind() if has_other_files(self.config.cluster) else []
        if not absent:
            return checked
        told = f"modules that don't go along with the task, and that each node must have: {', '.join(absent)}"
        return replace(checked, warnings=(*checked.warnings, told))

    def fit(
        self,
        *,
        resume: bool = False,
        progress: Progress | Callable[[str | ProgressEvent], None] | None = None,
        callbacks: list[Any] | None = None,
        resume_with: str = "fit(resume=True)",
    ) -> JobResult:
        """Runs the job to its published artifact.

        Args:
            resume: go on with the latest unfinished run of an equal job, where there is one.
            progress: hears what happens: a `Progress`, or any function of a line of text or a `ProgressEvent`. Without
                it a terminal or notebook shows the progress; elsewhere nothing is shown.
            callbacks: Ray Train callbacks for every stage's run.
            resume_with: what to tell who interrupts the job, as the way to go on with it.

        Raises:
            RaycompError: one error with its cause; nothing half-written stays in the artifacts' place.
            Interrupted: by SIGINT or SIGTERM; it has been told what is saved, and nothing is left running.
        """
        with shown(progress) as listener, ExitStack() as stack:
            driver = Driver(self.config, self._recipe, listener, callbacks or [], stack)
            return driver.fit(self.checked, resume, resume_with)
