"""Recurrent layers for inputs of any length: torch.export would run through one length, step by step, and fix it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table

# Those that ONNX has an operator for; others are exported as the steps of one length.
_OPERATORS = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
_KEY = torch._C.DispatchKey.CompositeImplicitAutograd


@contextmanager
def any_length() -> Iterator[None]:
    """While it is open, an export asks recurrent operators for the shapes of their results alone.

    The operators stand in the graph as they are, and compute when that is run.
    """
    kernels = [operator.py_kernels.get(_KEY) for operator in _OPERATORS]
    steps = [decomposition_table[operator] for operator in _OPERATORS]
    _set([_shapes] * len(_OPERATORS), [_shapes] * len(_OPERATORS))
    try:
        yield
    finally:
        _set(kernels, steps)


def _set(kernels: Sequence[Any], steps: Sequence[Any]) -> None:
    """The kernels are asked while a model is traced, the steps while the graph of that is taken apart for ONNX."""
    decomposition_table.update(zip(_OPERATORS, steps, strict=True))
    for operator, kernel in zip(_OPERATORS, kernels, strict=True):
        operator.py_kernels.pop(_KEY, None)
        if kernel is not None:
            operator.py_kernels[_KEY] = kernel
        operator._dispatch_cache.clear()


def _shapes(
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return input.new_empty((*input.shape[:-1], width)), *(torch.empty_like(state) for state in states)


def count_recurrent(graph: fx.Graph) -> int:
    """How many of its nodes are recurrent operators."""
    return sum(node.target in _OPERATORS for node in graph.nodes)
