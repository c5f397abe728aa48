"""How large a result may be: found on the meta device, before any memory is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raycomp.errors import SpeedupError

_FLOOR = 2**30
_RATIO = 1024
"""A result may have a GB, or this many times the bytes of all inputs and weights: far more than a layer makes."""
_TOTAL = 16
"""All results of one call may have this many times as much."""
_SHAPES = 512
_SIZED_BY_DATA = ("aten.one_hot", "aten.repeat_interleave")

Measure = Callable[[Callable[..., Any], list[Any], dict[str, Any], str], None]


class Allowance:
    """What a stored graph may allocate. A call is measured once for each set of input shapes."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def of(self, inputs: list[Any], module: nn.Module) -> Measure | None:
        """What to ask before each step of a call with these inputs; None where nothing is to be asked."""
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if _is_traced(tensors):
            return None
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if shapes in self._seen:
            return None
        if len(self._seen) < _SHAPES:
            self._seen.add(shapes)
        state = (*tensors, *module.parameters(), *module.buffers())
        return _measure(max(_FLOOR, _RATIO * sum(_bytes(tensor) for tensor in state)))


def _measure(most: int) -> Measure:
    made = 0

    def measure(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], name: str) -> None:
        nonlocal made
        if not isinstance(function, torch._ops.OpOverload):
            return
        try:
            with torch.no_grad():
                result = function(*_on_meta(args), **_on_meta(kwargs))
        except Exception as error:  # it has no meta form, or the arguments don't fit, which the call itself will tell
            if str(function.overloadpacket) in _SIZED_BY_DATA:
                raise SpeedupError(f"the size of the result of {function} can't be told", where=name) from error
            return
        size = sum(_bytes(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        made += size
        if size > most or made > _TOTAL * most:
            raise SpeedupError(
                f"{function} would make a tensor of {size / 1e9:,.1f} GB",
                where=name,
                remedy=f"a model of this size, and these inputs, should need no more than {most / 1e9:,.1f} GB",
            )

    return measure


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.device.type != "meta" else tensor.untyped_storage().nbytes()


def _on_meta(arguments: Any) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        return leaf

    return pytree.tree_map(convert, arguments)


def _is_traced(tensors: Iterable[Tensor]) -> bool:
    plain = (Tensor, nn.Parameter)
    return (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
        or any(type(tensor) not in plain or tensor.layout != torch.strided for tensor in tensors)
    )
