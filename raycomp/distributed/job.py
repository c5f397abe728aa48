"""CompressionJob: a job's settings, checked, and the way to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from raycomp.config import JobConfig, SourceMap, load_job_file, parse_job
from raycomp.config.storage import deleted_by_ray
from raycomp.distributed.cluster import connect, on_demand
from raycomp.distributed.load_task import load_task
from raycomp.distributed.run import Driver, JobResult
from raycomp.distributed.trainer import Progress, Silent
from raycomp.errors import ConfigError
from raycomp.pipeline.preflight import Checked, check_stages
from raycomp.pipeline.task import Task, prepare_task
from raycomp.report import ProgressPrinter
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

        A task whose data is Ray Data's is checked on the job's Ray, for as long as that takes.

        Returns:
            What the job's user should know before it runs: layers that will be masked and can't be cut.

        Raises:
            ConfigError, TaskError, StorageError: before anything has been started.
        """
        with ExitStack() as stack, on_demand(lambda: stack.enter_context(connect(self.config))):
            return self.checked(stack.enter_context(scratch()))[1].warnings

    def checked(self, folder: Path) -> tuple[Task, Checked]:
        """The task, prepared in `folder` and found to fit the job; errors as in `validate`."""
        job = self.config
        store = open_store(job.storage.uri, job.storage.endpoint, job.storage.region)
        try:
            if store.is_local and _WORKING_DIR in store.path:
                raise ConfigError([deleted_by_ray("storage.uri", job.storage.uri)])
            store.check()
            task = load_task(job.task, self.base_dir)
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
        with _shown(progress) as shown, ExitStack() as stack:
            driver = Driver(self.config, self.base_dir, shown, callbacks or [], stack)
            return driver.fit(self.checked, resume, resume_with)


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
