"""Which sizes of its inputs an exported model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils import _pytree as pytree

from raycomp.core.parts import as_call
from raycomp.speedup.graph.example import Example, bind, parameter_names
from raycomp.speedup.graph.program import FixedSize


@dataclass(frozen=True)
class ExportReport:
    """How a model was exported.

    Args:
        dynamic_batch: whether the file takes any batch size; else only that of the example.
        fixed: sizes that the file takes alone, though the inputs that it was exported for differ there.
    """

    dynamic_batch: bool
    fixed: tuple[str, ...] = ()


def leaf_names(model: nn.Module, example: Example) -> list[str]:
    """The names of an example's leaves, as the model's forward names its arguments: `input_ids`, `boxes.0`."""
    args, kwargs = as_call(example)
    paths, _ = pytree.tree_flatten_with_path(bind(parameter_names(model), args, kwargs))
    return [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]


def describe_fixed(fixed: Sequence[FixedSize], names: Sequence[str]) -> tuple[str, ...]:
    """Fixed sizes in words: `input_ids of size 29 in dimension 1`."""
    return tuple(f"{names[each.leaf]} of size {each.size} in dimension {each.dim}" for each in fixed)
