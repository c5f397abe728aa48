"""From a job's `task` entry to a constructed Task."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from raycomp.core.seeds import restored_generators, seed_generators
from raycomp.errors import TaskError
from raycomp.pipeline.task import Task, let_use
from raycomp.pipeline.user_code import user_code

if TYPE_CHECKING:
    from raycomp.config import TaskConfig


def build_task(config: TaskConfig, base_dir: Path | str = ".", prepared: Path | None = None) -> Task:
    """Imports the task's class and constructs it with the config's arguments.

    Args:
        config: `entrypoint` is `package.module:Class` or `path/to/file.py:Class`.
        base_dir: what a path is relative to; it is also searched for modules, as a file's own folder is.
        prepared: the folder that the task's `prepare` filled, where it has run.

    Raises:
        TaskError: the module or class is not there, is no Task, takes other arguments, or raises.
    """
    if config.object_digest is not None or config.entrypoint.startswith("__main__:"):
        raise TaskError(
            "Python gave the task; no file has it",
            where=f"task.entrypoint {config.entrypoint}",
            remedy="give it again, CompressionJob(…, task=…), or put its class into a file and name that",
        )
    task = construct(load_task_class(config.entrypoint, Path(base_dir)), config)
    let_use(task, prepared)
    return task


def construct(kind: type[Task], config: TaskConfig) -> Task:
    """The task that a class makes of the config's arguments.

    Raises:
        TaskError: the class takes others, or raises.
    """
    arguments: dict[str, object] = {**config.arguments}
    _check_arguments(kind, arguments, config.entrypoint)
    with restored_generators(), user_code(f"{kind.__name__}({', '.join(arguments)})"):
        # Every worker constructs it, and must get the same.
        seed_generators(0)
        return kind(**arguments)


def load_task_class(entrypoint: str, base_dir: Path) -> type[Task]:
    """The Task class that `entrypoint` names; see `build_task`."""
    source, colon, name = entrypoint.rpartition(":")
    if not colon or not source or not name:
        raise TaskError(
            f"{entrypoint!r} names no class",
            where="task.entrypoint",
            remedy="package.module:Class or path/to/file.py:Class",
        )
    _search_first(base_dir.resolve())
    module = (
        _import_file(base_dir / source, entrypoint) if source.endswith(".py") else _import_module(source, entrypoint)
    )
    return _task_class(module, name, entrypoint)


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _import_file(path: Path, entrypoint: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise TaskError(f"there is no file {path}", where=f"task.entrypoint {entrypoint}")
    _search_first(path.parent)
    # A name of its own, so that a file called like an installed package hides nothing.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with user_code(f"importing {path.name}"):
            spec.loader.exec_module(module)
    except TaskError:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, entrypoint: str) -> ModuleType:
    try:
        with user_code(f"importing {name}"):
            return importlib.import_module(name)
    except TaskError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and f"{name}.".startswith(f"{missing.name}."):
            raise TaskError(
                f"there is no module {missing.name!r}",
                where=f"task.entrypoint {entrypoint}",
                remedy="install it, or put it beside the job file",
            ) from missing
        raise


def _task_class(module: ModuleType, name: str, entrypoint: str) -> type[Task]:
    kind = getattr(module, name, None)
    if inspect.isclass(kind) and issubclass(kind, Task):
        return kind
    tasks = [key for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, Task)]
    choices = difflib.get_close_matches(name, tasks, n=1) or [key for key in tasks if key != "Task"]
    fault = "is not a subclass of raycomp.Task" if hasattr(module, name) else "is not there"
    raise TaskError(
        f"{name!r} {fault}",
        where=f"task.entrypoint {entrypoint}",
        remedy=f"its tasks are {', '.join(choices)}" if choices else "define a subclass of raycomp.Task",
    )


def _check_arguments(kind: type[Task], arguments: dict[str, object], entrypoint: str) -> None:
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no arguments"
        raise TaskError(
            f"{kind.__name__} does not take these arguments: {error}",
            where=f"task.arguments of {entrypoint}",
            remedy=f"it takes {takes}",
        ) from error
