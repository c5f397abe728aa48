"""What operators take on trust: those whose native code reads or writes beyond tensors of other sizes than it expects,
or ends the process on a number.

A stored graph may come from a stranger, so that these are looked at before such an operator is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raycomp.speedup.graph.result_bytes import is_traced

Check = Callable[[Sequence[Any], Mapping[str, Any]], None]
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> None:
    """The lengths are one for each index of a dimension, or (-1) one alone."""
    expected = [] if dim == -1 else [size if index == dim else 1 for index, size in enumerate(v.shape)]
    if v.ndim == 0 or not -1 <= dim < v.ndim or list(g.shape) != expected or v.dtype != g.dtype:
        raise ValueError(f"lengths of shape {tuple(g.shape)} for weights of shape {tuple(v.shape)}")


def _recurrent(gates: int) -> Callable[..., None]:
    def check(
        input: Tensor, hx: Any, params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool,
        **_: Any,
    ) -> None:  # fmt: skip
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        if input.ndim != 3 or any(state.ndim != 3 for state in states) or not states:
            raise ValueError("a recurrent layer takes three dimensions")
        directions, out, hidden = 1 + bidirectional, states[0].shape[2], states[-1].shape[2]
        rows = gates * hidden
        inner = [(rows, out), *([(rows,)] * 2 if has_biases else []), *([(out, hidden)] if out != hidden else [])]
        if len(params) != num_layers * directions * (1 + len(inner)):
            raise ValueError(f"{len(params)} weights of a recurrent layer")
        first, later = [(rows, input.shape[2]), *inner], [(rows, out * directions), *inner]
        expected = first * directions + later * directions * (num_layers - 1)
        if [tuple(weight.shape) for weight in params] != expected:
            raise ValueError("weights of other sizes than a recurrent layer's input and state")
        mixed = len({value.dtype for value in (input, *states, *params)}) > 1
        if mixed and not torch.is_autocast_enabled(input.device.type):
            raise ValueError("weights of another data type than a recurrent layer's input")

    return check


def _quotient(self: Any, other: Any, rounding_mode: str | None = None) -> None:
    """The least number by -1 is beyond all numbers of its type, for which a processor knows but an interrupt."""
    dtype = torch.result_type(self, other)
    if rounding_mode != "trunc" or dtype.is_floating_point or dtype.is_complex or is_traced():
        return
    least = torch.iinfo(torch.int64 if dtype == torch.bool else dtype).min
    beyond = (torch.as_tensor(self) == least) & (torch.as_tensor(other) == -1)
    if bool(beyond.any()):
        raise ValueError(f"{least} divided by -1 is no {dtype}")


_CHECKS: dict[str, Callable[..., None]] = {
    "aten._weight_norm.default": _weight_norm,
    **{
        f"aten.{name}.{kind}_mode": _quotient
        for name in ("div", "div_", "divide", "divide_")
        for kind in ("Tensor", "Scalar")
    },
    **{f"aten.{name}.input": _recurrent(gates) for name, gates in _GATES.items()},
}


def check_of(function: Any) -> Check | None:
    """What raises ValueError where an operator can't run what it is given; None for one that looks itself."""
    if not isinstance(function, torch._ops.OpOverload) or str(function) not in _CHECKS:
        return None
    check = _CHECKS[str(function)]
    names = [argument.name for argument in function._schema.arguments]

    def bound(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        check(**dict(zip(names, args, strict=False)), **kwargs)

    return bound
