"""How large a result may be: found on the meta device, before any memory is taken."""

from __future__ import annotations

from collections.abc import Callable
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
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
_SIZED_BY_DATA = ("aten.one_hot", "aten.repeat_interleave")


class Allowance:
    """What a stored graph may allocate. A call is measured once for each set of input shapes."""

    def __init__(self) -> None:
        self._passed: set[Shapes] = set()

    def of(self, inputs: list[Any], module: nn.Module) -> Measure | None:
        """What to ask before each step of a call with these inputs; None where nothing is to be asked."""
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if is_traced() or not all(map(_is_plain, tensors)):
            return None
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if shapes in self._passed:
            return None
        state = (*tensors, *module.parameters(), *module.buffers())
        return Measure(shapes, max(_FLOOR, _RATIO * sum(_bytes(tensor) for tensor in state)))

    def keep(self, measure: Measure) -> None:
        """Remembers that a whole call has passed."""
        if len(self._passed) < _SHAPES:
            self._passed.add(measure.shapes)


class Measure:
    """Adds up what the steps of one call make.

    Args:
        shapes: of the inputs.
        most: bytes that one result may have.
    """

    def __init__(self, shapes: Shapes, most: int) -> None:
        self.shapes, self.most, self.made = shapes, most, 0

    def step(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], name: str) -> None:
        """Looks at a step before it is done.

        Raises:
            SpeedupError: its result would be too large.
        """
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
        self.made += size
        if size > self.most or self.made > _TOTAL * self.most:
            raise SpeedupError(
                f"{function} would make a tensor of {size / 1e9:,.1f} GB",
                where=name,
                remedy=f"a model of this size, and these inputs, should need no more than {self.most / 1e9:,.1f} GB",
            )


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


def is_traced() -> bool:
    """Whether a call only records what a model does: sizes may be symbols then, and errors speak to the tracer."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
