"""How each process of a job makes the user's task: of the file or module that the job names, or of what Python gave."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle

from raycomp.config import TaskConfig
from raycomp.distributed import travel
from raycomp.distributed.task_digest import digest
from raycomp.errors import TaskError
from raycomp.pipeline.entrypoint import build_task, construct
from raycomp.pipeline.task import Task, let_use


@dataclass(frozen=True)
class TaskRecipe:
    """What it takes to make the task.

    Args:
        base_dir: what the path of a task's file is relative to: the folder on the driver; on other nodes, which don't
            have it, a process's copy of the working directory stands in.
        pickled: the task or its class, where Python gave one, or why it can't travel. It goes through Ray alone: what
            is in storage may come from anyone, and unpickling runs code.
        search: where the driver finds modules; processes that have these folders do, too.
    """

    base_dir: str
    pickled: bytes | TaskError | None = None
    search: tuple[str, ...] = ()

    @classmethod
    def of(cls, base_dir: Path, task: Task | type[Task] | None) -> TaskRecipe:
        """The recipe of what Python gave, or of what the job names."""
        try:
            pickled: bytes | TaskError | None = None if task is None else travel.pickled(task)
        except TaskError as error:
            pickled = error
        return cls(str(base_dir), pickled, tuple(str(Path(folder).absolute()) for folder in sys.path))

    def given(self) -> Task | type[Task] | None:
        """What Python gave, as another process gets it; None where the job names its task.

        Raises:
            TaskError: it can't travel.
        """
        sys.path += [folder for folder in self.search if folder not in sys.path and Path(folder).is_dir()]
        if isinstance(self.pickled, TaskError):
            raise self.pickled
        return None if self.pickled is None else travel.unpickled(self.pickled)

    def left_behind(self) -> list[str]:
        """Modules of the user's that the task needs, and that nodes must find for themselves."""
        return travel.left_behind(self.pickled) if isinstance(self.pickled, bytes) else []

    def make(self, config: TaskConfig, prepared: Path | None = None) -> Task:
        """The task.

        Args:
            config: the job's entry of it.
            prepared: the folder that the task's `prepare` filled, where it has run.

        Raises:
            TaskError: it can't be made, or its own code raised.
        """
        found = self.given()
        if found is None:
            return self._built(config, prepared)
        task = found if isinstance(found, Task) else construct(found, config)
        let_use(task, prepared)
        return task

    def _built(self, config: TaskConfig, prepared: Path | None) -> Task:
        folder = Path(self.base_dir)
        task = build_task(config, folder if folder.is_dir() else Path.cwd(), prepared)
        if ".py:" in config.entrypoint:
            # Functions of the file go to tasks of Ray Data, and no other process can import it by the name it has here.
            cloudpickle.register_pickle_by_value(sys.modules[type(task).__module__])
        return task


def task_entry(task: Any) -> dict[str, str | None]:
    """What stands in the job of a task that Python gave.

    Raises:
        TaskError: it is no task.
    """
    kind = task if inspect.isclass(task) else type(task)
    if not issubclass(kind, Task):
        raise TaskError(
            f"got {kind.__name__ if inspect.isclass(task) else task!r}",
            where="CompressionJob(task=…)",
            remedy="give an instance of a subclass of raycomp.Task, or the class",
        )
    held = digest(task) if isinstance(task, Task) else None
    return {"entrypoint": f"{kind.__module__}:{kind.__name__}", "object_digest": held}
