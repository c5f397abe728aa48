"""How a model is called: example inputs, their batch size, and nested values as flat lists of tensors.

An example is what everything in `raycomp.speedup` takes: a tensor, a tuple of positional arguments, or a dict of
keyword arguments.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raycomp.core.parts import as_call
from raycomp.errors import SpeedupError

Example: TypeAlias = "Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]"
Tree: TypeAlias = dict[str, Any]
"""A JSON description of a nested value: `{"kind": "tensor" | "tuple" | "list" | "dict" | "constant", ...}`."""


class Outputs(OrderedDict[str, Any]):
    """A dict of outputs whose keys are attributes and positions, too, like Hugging Face's `ModelOutput`."""

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no output {name!r}, only {', '.join(self)}") from None


def as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """The parts of a mapping or a dataclass by name; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def plain(value: Any) -> Any:
    """A nested value in Python's own containers: what the user's classes hold as dicts, named tuples too.

    Leaves stay as they are.
    """
    named = value._asdict() if hasattr(value, "_asdict") else as_mapping(value)
    if named is not None:
        return {str(key): plain(item) for key, item in named.items()}
    if isinstance(value, (tuple, list)):
        return [plain(i) for i in value] if isinstance(value, list) else tuple(plain(item) for item in value)
    return value


def with_attributes(value: Any) -> Any:
    """A plain nested value with its dicts as `Outputs`."""
    if isinstance(value, Mapping):
        return Outputs({key: with_attributes(item) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(with_attributes(item) for item in value)
    return value


def batch_size(example: Example) -> int:
    """The size of the first dimension of the example's first tensor.

    Raises:
        SpeedupError: the example holds no tensor with a dimension.
    """
    for leaf in pytree.tree_leaves(as_call(example)):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise SpeedupError(
        "the example input holds no tensor with a batch dimension",
        remedy="give a tensor, a tuple of arguments or a dict of keyword arguments with the batch in dimension 0",
    )


def is_batched(leaf: object, size: int) -> bool:
    """Whether a leaf of an example carries the batch in its first dimension."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size


def with_batch_size(example: Example, size: int) -> Example:
    """The example with `size` samples: its own, repeated in turn or cut off."""
    present = batch_size(example)

    def resize(leaf: Any) -> Any:
        return leaf[torch.arange(size) % present] if is_batched(leaf, present) else leaf

    if isinstance(example, Mapping):
        return {name: pytree.tree_map(resize, value) for name, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(pytree.tree_map(resize, value) for value in example)
    resized: Tensor = resize(example)
    return resized


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of `forward`'s parameters that can be given by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds)


def bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name; positional ones beyond the names (`*args`) are named by their index."""
    bound = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}
    twice = sorted(bound.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"got several values for argument {twice[0]!r}")
    return bound | dict(kwargs)


def bind_as_exported(
    tree: Tree, names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by parameter name, those that the model was exported with.

    Raises:
        TypeError: others, or not all.
    """
    bound, taken = bind(names, args, kwargs), tree["items"]
    more, less = ([name for name in some if name not in others] for some, others in ((bound, taken), (taken, bound)))
    if not more and not less:
        return bound
    said = f"{'got' if more else 'needs'} {', '.join(more or less)}"
    remedy = "; what else its class takes, the model of that class does: raycomp.load(uri, model)" if more else ""
    raise TypeError(f"the exported program takes {', '.join(taken)}, and {said}{remedy}")


def describe(value: Any) -> Tree:
    """The JSON description of a nested value of tensors, sequences, mappings, dataclasses and constants of Python.

    Raises:
        SpeedupError: a leaf is neither a tensor nor a constant of Python.
    """
    if isinstance(value, Tensor):
        return {"kind": "tensor"}
    named = as_mapping(value)
    if named is not None:
        items = {str(key): describe(item) for key, item in named.items()}
        return {"kind": "dict", "items": items, "attributes": type(value) is not dict}
    if isinstance(value, (tuple, list)):
        tree: Tree = {"kind": "list" if isinstance(value, list) else "tuple", "items": [describe(i) for i in value]}
        if hasattr(value, "_fields"):
            tree |= {"fields": list(value._fields), "name": type(value).__name__}
        return tree
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"kind": "constant", "value": value}
    raise SpeedupError(
        f"the model takes or returns a {type(value).__name__}",
        remedy="tensors in tuples, lists, dicts, dataclasses or Hugging Face outputs can be exported; "
        "a Hugging Face decoder returns tensors alone with use_cache=False",
    )


def flatten(tree: Tree, value: Any) -> list[Tensor]:
    """The tensors of `value`, in the order of its description.

    Raises:
        TypeError: the value has another structure than the description.
    """
    kind = tree["kind"]
    if kind == "tensor":
        if not isinstance(value, Tensor):
            raise TypeError(f"expected a tensor, got {type(value).__name__}")
        return [value]
    if kind == "constant":
        if value != tree["value"]:
            raise TypeError(f"the model was exported with {tree['value']!r} here, not {value!r}")
        return []
    items = tree["items"]
    if kind == "dict":
        named = as_mapping(value)
        if named is None or set(named) != set(items):
            raise TypeError(f"expected a mapping with the keys {', '.join(items)}")
        return [tensor for key, item in items.items() for tensor in flatten(item, named[key])]
    if not isinstance(value, (tuple, list)) or len(value) != len(items):
        raise TypeError(f"expected a sequence of {len(items)}")
    return [tensor for item, part in zip(items, value, strict=True) for tensor in flatten(item, part)]


def rebuild(tree: Tree, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `flatten`: takes the tensors it needs from the iterator."""
    kind = tree["kind"]
    if kind == "tensor":
        return next(tensors)
    if kind == "constant":
        return tree["value"]
    if kind == "dict":
        items = {key: rebuild(item, tensors) for key, item in tree["items"].items()}
        return Outputs(items) if tree["attributes"] else items
    parts = [rebuild(item, tensors) for item in tree["items"]]
    if "fields" in tree:
        return namedtuple(tree["name"], tree["fields"])(*parts)
    return parts if kind == "list" else tuple(parts)
