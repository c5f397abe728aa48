"""`torch.export` of a model, open in the sizes that differ between real inputs where the model allows it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from raycomp.core.parts import as_call
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import (
    Example,
    batch_size,
    describe,
    is_batched,
    plain,
    with_batch_size,
)
from raycomp.speedup.graph.recurrent import any_length

_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


def export(model: nn.Module, example: Example, dynamic_shapes: Any = None) -> ExportedProgram:
    """Exports a model in its present mode, dtype and device; what it returns in classes of its own becomes dicts.

    Args:
        model: the model.
        example: an input of it, whose sizes alone the program takes by default.
        dynamic_shapes: as `torch.export.export` takes them.

    Raises:
        SpeedupError: torch can't export the model for this example.
    """
    args, kwargs = as_call(example)
    module = _without_graph(model)
    given = list[Any]()

    def in_known_classes(module: nn.Module, args: Any, output: Any) -> Any:
        given.append(plain(output))
        return given[-1]

    # torch.export knows no classes but its own; a hook leaves the names of parameters and arguments as they are.
    hook = module.register_forward_hook(in_known_classes)
    try:
        with quiet(), torch.no_grad(), any_length():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        for output in given:
            describe(output)  # knows better what is in the way
        raise SpeedupError(
            f"{type(model).__name__} cannot be exported: {cause_of(error)}",
            remedy="its forward must not branch on tensor values, must take the example input, and return tensors",
        ) from error
    finally:
        hook.remove()


def _without_graph(model: nn.Module) -> nn.Module:
    """A graph module as a module like any other, which shares all with it: torch.export would run its nodes instead of
    calling it, past its hooks.
    """
    if not isinstance(model, fx.GraphModule):
        return model
    kind: type[nn.Module] = type(type(model).__name__, (nn.Module,), {"forward": staticmethod(model.forward)})
    module = kind.__new__(kind)
    module.__dict__.update(model.__dict__)
    return module


@dataclass(frozen=True)
class FixedSize:
    """A size that a program takes alone, though real inputs differ there.

    Args:
        leaf: which of the example's leaves.
        dim: which of its dimensions.
        size: the size.
    """

    leaf: int
    dim: int
    size: int


@dataclass(frozen=True)
class OpenProgram:
    """An exported program, and what sizes it takes.

    Args:
        program: what `torch.export` gave.
        dynamic_batch: whether it takes any batch size.
        fixed: sizes that it takes alone, though the inputs that it was exported for differ there.
        varying: the same for all dimensions in which the inputs differ, whether the program takes them or not.
        others: inputs of other sizes than the one that it was traced with.
    """

    program: ExportedProgram
    dynamic_batch: bool
    fixed: tuple[FixedSize, ...]
    varying: tuple[FixedSize, ...]
    others: tuple[Example, ...]


def export_program(model: nn.Module, example: Example, others: Sequence[Example] = ()) -> OpenProgram:
    """Exports the model as it is, for any batch size, and for the sizes in which the inputs differ, where it allows it.

    Tensors whose first dimension is as long as the first tensor's are taken to carry the batch. An example of one
    sample is doubled, because sizes 0 and 1 are always specialised; for the same reason the largest input is traced.
    Each input is run: symbolic shapes alone do not tell, as a size that the model bakes in may be left to run time.

    Args:
        model: in the mode (train or eval), dtype and device that is to be exported.
        example: an input of it.
        others: further inputs, of other lengths or image sizes.

    Raises:
        SpeedupError: the model cannot be exported at all.
    """
    largest, *rest = sorted([example, *others], key=_numel, reverse=True)
    size = max(2, batch_size(largest))
    largest = with_batch_size(largest, size)
    alike = [other for other in (with_batch_size(each, size) for each in rest) if _same_structure(largest, other)]
    varying = _varying(largest, alike)
    program = _most_open(model, largest, size, varying)
    with quiet(), torch.no_grad():
        dynamic_batch = _takes(program, with_batch_size(largest, size + 1))
        fixed = [each for each in varying if not _is_open(program, each)]
        if not fixed and not all(_takes(program, other) for other in alike):
            fixed = varying
    return OpenProgram(program, dynamic_batch, tuple(fixed), tuple(varying), tuple(alike if varying else ()))


def _numel(example: Example) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(as_call(example)) if isinstance(leaf, Tensor))


def _same_structure(left: Example, right: Example) -> bool:
    (ours, spec), (theirs, other) = (pytree.tree_flatten(as_call(each)) for each in (left, right))
    return spec == other and all(
        a.ndim == b.ndim and a.dtype == b.dtype
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _varying(example: Example, others: Sequence[Example]) -> list[FixedSize]:
    """The dimensions in which the inputs differ, with the example's sizes."""
    leaves = [pytree.tree_leaves(as_call(each)) for each in (example, *others)]
    return [
        FixedSize(index, dim, size)
        for index, (leaf, *same) in enumerate(zip(*leaves, strict=True))
        if isinstance(leaf, Tensor)
        for dim, size in enumerate(leaf.shape)
        if any(other.shape[dim] != size for other in same)
    ]


def _most_open(model: nn.Module, example: Example, size: int, varying: Sequence[FixedSize]) -> ExportedProgram:
    for sizes, batch in ((varying, size), ((), size), (varying, None)) if varying else (((), size),):
        with contextlib.suppress(SpeedupError):
            return export(model, example, _open_shapes(model, example, batch, sizes))
    # Whatever keeps sizes from being dynamic: fixed ones are the second best.
    return export(model, example)


def _open_shapes(model: nn.Module, example: Example, size: int | None, varying: Sequence[FixedSize]) -> Any:
    """The dynamic shapes that leave the batch of `size` samples and the varying dimensions open."""
    leaves, spec = pytree.tree_flatten(as_call(example))
    shapes = [{0: Dim.AUTO} if size is not None and is_batched(leaf, size) else {} for leaf in leaves]
    for each in varying:
        shapes[each.leaf][each.dim] = Dim.AUTO
    args, kwargs = pytree.tree_unflatten([shape or None for shape in shapes], spec)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _is_open(program: ExportedProgram, each: FixedSize) -> bool:
    names = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == names[each.leaf])
    return not isinstance(node.meta["val"].shape[each.dim], int)


def _takes(program: ExportedProgram, example: Example) -> bool:
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
