"""What it is of a task that can't travel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType

from ray import cloudpickle

from raycomp.pipeline.task import Task


def culprit(task: Task | type[Task], stays: Callable[[object], bool]) -> str:
    """What it is of a task that stays here: the innermost of its parts, by where the user finds it."""
    kind = task if inspect.isclass(task) else type(task)
    found: tuple[str, object] = kind.__name__, task
    met = {id(task)}
    while True:
        within = ((name, part) for name, part in _parts(*found) if id(part) not in met and stays(part))
        inner = next(within, None)
        if inner is None:
            return "the task" if found[1] is task else found[0]
        found = inner
        met.add(id(found[1]))


def cant_leave(value: object) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return True
    return False


def cant_return(value: object) -> bool:
    try:
        cloudpickle.loads(cloudpickle.dumps(value))
    except Exception:
        return True
    return False


def nonlocals_of(function: FunctionType) -> dict[str, object]:
    """What a function holds of those around it, by name, but for the class that its `super()` needs."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != CellType() and name != "__class__"}


def _parts(name: str, value: object) -> Iterator[tuple[str, object]]:
    """What a value holds, by name: items, attributes, members of its class, what its functions find outside."""
    if isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, FunctionType):
        yield from ((f"{each!r}, which {value.__qualname__}() uses,", item) for each, item in _outside(value).items())
    elif isinstance(value, MethodType | staticmethod | classmethod):
        yield from ((name, getattr(value, each)) for each in ("__func__", "__self__") if hasattr(value, each))
    elif isinstance(value, property):
        yield from ((name, each) for each in (value.fget, value.fset) if each is not None)
    elif isinstance(value, partial):
        yield from _parts(name, (value.func, *value.args, *value.keywords.values()))
    elif inspect.isclass(value):
        for base in value.__mro__[: value.__mro__.index(Task if issubclass(value, Task) else object)]:
            yield from ((f"{base.__name__}.{each}", member) for each, member in _members(base).items())
    else:
        yield from ((f"{name}.{each}", item) for each, item in _attributes(value).items())
        yield name, type(value)


def _members(kind: type) -> dict[str, object]:
    """Those that go along with a class: not the access to its instances' slots, nor what ABCMeta keeps."""
    own = (GetSetDescriptorType, MemberDescriptorType)
    return {name: each for name, each in vars(kind).items() if not isinstance(each, own) and name != "_abc_impl"}


def _attributes(value: object) -> dict[str, object]:
    slots = [each for base in type(value).__mro__ for each in vars(base).get("__slots__", ())]
    return {**{each: getattr(value, each) for each in slots if hasattr(value, each)}, **getattr(value, "__dict__", {})}


def _outside(function: FunctionType) -> dict[str, object]:
    """What a function and those within it find outside of themselves, by name."""
    names, codes = set[str](), [function.__code__]
    for code in codes:
        names.update(code.co_names)
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names & function.__globals__.keys())}
    return {**found, **nonlocals_of(function)}
