"""The module of a forward pass in which values stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raycomp.core.selection import module_names

THE_BATCH = "the batch"


def first_place(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The first module of a forward pass that is given, or gives, what isn't finite."""
    places: list[str] = []
    with _looking(model, places), torch.no_grad():
        try:
            run()
        except Exception:  # whatever a forward pass raises on such values: there is an error to be told already
            return places[0] if places else None
    return places[0] if places else None


@contextmanager
def _looking(model: nn.Module, places: list[str]) -> Iterator[None]:
    def look_at_inputs(name: str, args: Any, kwargs: Any) -> None:
        if _is_spoilt((args, kwargs)):
            places.append(f"what the layer {name!r} is given" if name else THE_BATCH)

    def look_at_output(name: str, output: Any) -> None:
        if _is_spoilt(output):
            places.append(f"the layer {name!r}" if name else "the model's output")

    handles = []
    for name in module_names(model):
        module = model.get_submodule(name)
        before = lambda _, args, kwargs, name=name: look_at_inputs(name, args, kwargs)  # noqa: E731
        after = lambda _, args, output, name=name: look_at_output(name, output)  # noqa: E731
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_spoilt(value: Any) -> bool:
    """Whether a tensor in it holds NaN or +inf; -inf is how attention masks say no."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(not bool((leaf < torch.inf).all()) for leaf in leaves)
