"""`torch.export` of a model, with a batch of any size where the model allows it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from raycomp.core.parts import as_call
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, batch_size, is_batched, with_batch_size

_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


def export(model: nn.Module, example: Example, dynamic_shapes: Any = None) -> ExportedProgram:
    """Exports a model in its present mode, dtype and device.

    Args:
        model: the model.
        example: an input of it, whose sizes alone the program takes by default.
        dynamic_shapes: as `torch.export.export` takes them.

    Raises:
        SpeedupError: torch can't export the model for this example.
    """
    args, kwargs = as_call(example)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise SpeedupError(
            f"{type(model).__name__} cannot be exported: {cause_of(error)}",
            remedy="its forward must not branch on tensor values, and must take the example input",
        ) from error


def export_program(model: nn.Module, example: Example) -> tuple[ExportedProgram, bool]:
    """Exports the model as it is, and says whether the program takes any batch size.

    Tensors whose first dimension is as long as the first tensor's are taken to carry the batch. An example of one
    sample is doubled, because sizes 0 and 1 are always specialised.

    Args:
        model: in the mode (train or eval), dtype and device that is to be exported.
        example: an input of it.

    Raises:
        SpeedupError: the model cannot be exported at all.
    """
    example = with_batch_size(example, max(2, batch_size(example)))
    size = batch_size(example)
    try:
        program = export(model, example, _open_batch(model, example, size))
    except SpeedupError:
        # Whatever keeps the batch from being dynamic: a fixed one is the second best.
        program = export(model, example)
    with quiet(), torch.no_grad():
        return program, _takes(program, with_batch_size(example, size + 1))


def _open_batch(model: nn.Module, example: Example, size: int) -> Any:
    """The dynamic shapes that leave the batch size open."""
    args, kwargs = as_call(example)
    bound = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    return pytree.tree_map(lambda leaf: {0: Dim.AUTO} if is_batched(leaf, size) else None, bound)


def _takes(program: ExportedProgram, example: Example) -> bool:
    # Symbolic shapes alone do not tell: a size that the model bakes in may be left to a check at run time.
    args, kwargs = as_call(example)
    try:
        program.module()(*args, **kwargs)
    except Exception:
        return False
    return True


def cause_of(error: BaseException) -> str:
    """The type and first line of the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' warnings and log lines away from users; errors raise all the same."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    # Of a model that it can't export, torch prints the whole graph to standard error.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def as_float32(model: nn.Module) -> nn.Module:
    """A copy of the model on the CPU, in float32 and eval mode, without gradients."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def example_as_float32(example: Example) -> Example:
    """The example on the CPU, its floating-point tensors in float32."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().cpu().float() if leaf.is_floating_point() else leaf.detach().cpu()

    if isinstance(example, Mapping):
        return {name: pytree.tree_map(convert, value) for name, value in example.items()}
    return tuple(pytree.tree_map(convert, value) for value in as_call(example)[0])
