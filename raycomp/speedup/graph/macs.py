"""Multiply-accumulates of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from raycomp.core.model import evaluation_mode
from raycomp.core.parts import as_call
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, with_batch_size
from raycomp.speedup.graph.program import cause_of, quiet


def count_macs(model: nn.Module, example: Example) -> int:
    """Multiply-accumulates of one forward with one sample: of all its convolutions and products of matrices.

    Those within recurrent layers and attention count, too. Additions, norms and activations don't.

    Raises:
        SpeedupError: the model cannot run on the example.
    """
    args, kwargs = as_call(with_batch_size(example, 1))
    counter = _Counter()
    try:
        with evaluation_mode(model), torch.no_grad(), _plain_kernels(), counter:
            model(*args, **kwargs)
    except Exception as error:
        raise SpeedupError(
            f"{type(model).__name__} cannot run on one sample of the example: {cause_of(error)}",
            remedy="the example must be an input of this model, with the batch in dimension 0",
        ) from error
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """Adds up what the operators that run multiply and add; torch's own mode follows modules, which gradients upset."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Recurrent layers and attention as the products they consist of, not as one operator that no counter knows."""
    fused_layers = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with quiet(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_layers)


def _flops_of_vectors(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Of a matrix or vector times a vector."""
    return 2 * math.prod(left)


def _flops_of_added_vectors(_added: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return _flops_of_vectors(left, right)


def _flops_of_added_batches(_added: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * int(right[-1])


def _flops_of_trilinear(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """Of `nn.Bilinear`: like a linear layer on all products of both inputs, each weight once for each sample."""
    return 2 * int(first[0]) * math.prod(second)


_FORMULAS: Mapping[Any, Callable[..., Any]] = {
    **flop_registry,
    **{
        operator: shape_wrapper(formula)
        for operator, formula in {
            torch.ops.aten.mv: _flops_of_vectors,
            torch.ops.aten.dot: _flops_of_vectors,
            torch.ops.aten.vdot: _flops_of_vectors,
            torch.ops.aten.addmv: _flops_of_added_vectors,
            torch.ops.aten.addbmm: _flops_of_added_batches,
            torch.ops.aten._trilinear: _flops_of_trilinear,
        }.items()
    },
}
"""Floating-point operations by operator: torch's, and of products that it lacks."""
