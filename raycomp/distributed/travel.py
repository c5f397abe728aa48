"""Whether, and how, what the user made in Python gets to other processes."""

from __future__ import annotations

import hashlib
import inspect
import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import packages_distributions
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from ray import cloudpickle
from torch import Tensor

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
                f"{_culprit(task)} can't travel to the workers: {error}",
                where=_WHERE,
                remedy="make it in model(), train_data() or another method that needs it: they run on every worker",
            ) from error
    unpickled(data)
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
        raise TaskError(
            f"it can't be unpickled: {type(error).__name__}: {error}",
            where=_WHERE,
            remedy="give its class, CompressionJob(task=MyTask): every worker then makes its own",
        ) from error
    return found


def left_behind(data: bytes) -> list[str]:
    """The modules of the user's that a pickled task needs and that don't go along with it."""
    unpickler = _Importing(io.BytesIO(data))
    unpickler.load()
    return sorted(module.__name__ for module in _own_modules(unpickler.modules))


def digest(task: Task) -> str | None:
    """The sha256, in hex, of what a task holds: the same in every process that made it alike.

    Code stands in it by its name, as a job names its task; tensors by their numbers. A set of texts differs between
    processes. None where something in it can't be pickled.
    """
    file = io.BytesIO()
    try:
        _Naming(file).dump(vars(task))
    except Exception:
        return None
    return hashlib.sha256(file.getvalue()).hexdigest()


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


class _Naming(cloudpickle.Pickler):  # type: ignore[misc]
    def persistent_id(self, value: object) -> object:
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, Tensor):
            numbers = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return str(value.dtype), tuple(value.shape), hashlib.sha256(numbers).hexdigest()
        return None


def _own_modules(names: set[str]) -> list[ModuleType]:
    """Those of the loaded modules of these names that are files of the user's, and no installed package's."""
    installed = {"__main__", "raycomp", *sys.stdlib_module_names, *packages_distributions()}
    found = [sys.modules[name] for name in sorted(names & sys.modules.keys())]
    return [module for module in found if _has_file(module) and module.__name__.partition(".")[0] not in installed]


def _has_file(module: ModuleType) -> bool:
    return getattr(module, "__file__", None) is not None


def _culprit(task: Task | type[Task]) -> str:
    for name, part in _parts(task):
        try:
            cloudpickle.dumps(part)
        except Exception:
            return name
    return "the task"


def _parts(task: Task | type[Task]) -> Iterator[tuple[str, object]]:
    """What a task and its class hold, by name: attributes, and what the methods find outside of themselves."""
    kind = task if inspect.isclass(task) else type(task)
    yield from ((f"{kind.__name__}'s {name!r}", part) for name, part in vars(task).items() if not inspect.isclass(task))
    for base in kind.__mro__[: kind.__mro__.index(Task)]:
        for name, member in vars(base).items():
            function = inspect.unwrap(getattr(member, "__func__", member))
            if not inspect.isfunction(function):
                yield f"{base.__name__}.{name}", member
                continue
            outside = inspect.getclosurevars(function)
            for other, value in {**outside.globals, **outside.nonlocals}.items():
                yield f"{other!r}, which {base.__name__}.{name}() uses,", value
