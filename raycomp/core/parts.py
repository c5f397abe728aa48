"""One argument of a call, or one part of an output, replaced: by index, name or field."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Change = Callable[[Any], Any]


def replace_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], key: str, names: Sequence[str], change: Change
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with one of them passed through `change`; all as they were where the call doesn't give it.

    Args:
        args, kwargs: the arguments.
        key: the argument's index or name.
        names: the names of forward's parameters, in order.
        change: what is done to it.
    """
    index = int(key) if key.isdigit() else names.index(key) if key in names else len(args)
    if index < len(args):
        return (*args[:index], change(args[index]), *args[index + 1 :]), dict(kwargs)
    name = names[index] if key.isdigit() and index < len(names) else key
    return args, {**kwargs, name: change(kwargs[name])} if name in kwargs else dict(kwargs)


def replace_output(output: Any, key: str, change: Change) -> Any:
    """An output with one part passed through `change`, in the output's own class; as it was where it lacks the part.

    The output itself stays as it is, but for a mapping whose class can't be copied, which is changed in place.

    Args:
        output: a single value (part 0), or a mapping, tuple, list or named tuple of parts.
        key: the part's index, its key in a mapping, or its field in a named tuple.
        change: what is done to it.
    """
    if isinstance(output, Mapping):
        names = list(output)
        name = names[int(key)] if key.isdigit() and int(key) < len(names) else key
        if name not in output:
            return output
        changed = _copied(output)
        changed[name] = change(output[name])  # type: ignore[index]
        return changed
    if not isinstance(output, tuple | list):
        return change(output) if key == "0" else output
    fields = getattr(output, "_fields", ())
    index = fields.index(key) if key in fields else int(key) if key.isdigit() else len(output)
    if index >= len(output):
        return output
    parts = [change(part) if position == index else part for position, part in enumerate(output)]
    return type(output)(*parts) if fields else type(output)(parts)


def _copied(output: Mapping[Any, Any]) -> Mapping[Any, Any]:
    try:
        return copy.copy(output)
    except TypeError:
        # A class whose constructor asks for more than the items: it is kept by a change in place.
        return output


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an example stands for: a tensor, a sequence, or a mapping of them."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}
