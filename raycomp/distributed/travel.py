"""Whether, and how, what the user made in Python gets to other processes."""

from __future__ import annotations

import inspect
import io
import pickle
import sys
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import packages_distributions
from types import ModuleType
from typing import Any

from ray import cloudpickle

from raycomp.distributed.culprit import cant_leave, cant_return, culprit
from raycomp.errors import TaskError
from raycomp.pipeline.task import Task

_WHERE = "CompressionJob(task=…)"


def pickled(task: Task | type[Task]) -> bytes:
    """A task or class as any process can read it; the modules of the user's that its classes stand in go along.

    Raises:
        TaskError: names what can't travel.
    """
    kind = task if inspect.isclass(task) else type(task)
    with ExitStack() as stack:
        names = {base.__module__ for base in kind.__mro__} - cloudpickle.list_registry_pickle_by_value()
        for module in _own_modules(names):
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        try:
            data: bytes = cloudpickle.dumps(task)
        except Exception as error:
            raise TaskError(
                f"{culprit(task, cant_leave)} can't travel to the workers: {error}",
                where=_WHERE,
                remedy="make it in model(), train_data() or another method that needs it: they run on every worker",
            ) from error
        try:
            cloudpickle.loads(data)
        except Exception as error:
            raise _not_read(culprit(task, cant_return), error) from error
    return data


def unpickled(data: bytes) -> Task | type[Task]:
    """What `pickled` made its bytes of.

    Raises:
        TaskError: a module that it needs isn't there, or unpickling raised.
    """
    try:
        found: Task | type[Task] = cloudpickle.loads(data)
    except ModuleNotFoundError as error:
        raise TaskError(
            f"the task needs the module {error.name!r}, which isn't on this node",
            where=_WHERE,
            remedy="install it on the nodes, or send it in the working directory of `ray job submit`",
        ) from error
    except Exception as error:
        raise _not_read("it", error) from error
    return found


def _not_read(what: str, error: Exception) -> TaskError:
    return TaskError(
        f"{what} can't be unpickled: {type(error).__name__}: {error}",
        where=_WHERE,
        remedy="give the task's class, CompressionJob(task=MyTask): every worker then makes its own",
    )


def left_behind(data: bytes) -> list[str]:
    """The modules of the user's that a pickled task needs and that don't go along with it."""
    unpickler = _Importing(io.BytesIO(data))
    unpickler.load()
    return sorted(module.__name__ for module in _own_modules(unpickler.modules))


class _Importing(pickle.Unpickler):
    """Keeps the names of the modules that it is made to import."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules = set[str]()

    def find_class(self, module: str, name: str) -> Any:
        self.modules.add(module)
        return self._whole if name == "subimport" else super().find_class(module, name)

    def _whole(self, module: str) -> ModuleType:
        self.modules.add(module)
        return import_module(module)


def _own_modules(names: set[str]) -> list[ModuleType]:
    """Those of the loaded modules of these names that are files of the user's, and no installed package's."""
    installed = {"__main__", "raycomp", *sys.stdlib_module_names, *packages_distributions()}
    found = [sys.modules[name] for name in sorted(names & sys.modules.keys())]
    return [module for module in found if _has_file(module) and module.__name__.partition(".")[0] not in installed]


def _has_file(module: ModuleType) -> bool:
    return getattr(module, "__file__", None) is not None
