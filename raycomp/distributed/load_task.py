"""The user's task in a process of Ray's."""

from __future__ import annotations

import sys
from pathlib import Path

from ray import cloudpickle

from raycomp.config import TaskConfig
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.task import Task


def load_task(config: TaskConfig, base_dir: str | Path, prepared: Path | None = None) -> Task:
    """As `build_task`, with functions of its file that go to tasks of Ray Data, too.

    Args:
        config: where it is.
        base_dir: what its path is relative to: the folder on the driver; on other nodes, which don't have it, this
            process's copy of the working directory stands in.
        prepared: the folder that the task's `prepare` filled, where it has run.
    """
    folder = Path(base_dir)
    task = build_task(config, folder if folder.is_dir() else Path.cwd(), prepared)
    if ".py:" in config.entrypoint:
        # No other process can import it by the name that it has here.
        cloudpickle.register_pickle_by_value(sys.modules[type(task).__module__])
    return task
