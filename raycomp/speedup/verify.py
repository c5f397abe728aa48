"""Holds the sped-up model against the one that it was cut from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.model import evaluation_mode
from raycomp.core.parts import as_call
from raycomp.core.seeds import restored_generators, seed_everything
from raycomp.errors import SpeedupError
from raycomp.results.summary import Verification
from raycomp.speedup.graph.example import Example, with_batch_size

BATCH_SIZES = (1, 8)


def verify(
    simulated: nn.Module,
    sped_up: nn.Module,
    inputs: Sequence[Example],
    tolerance: float = 1e-4,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Verification:
    """Runs both models in eval mode on the same inputs.

    Args:
        simulated: the masked model.
        sped_up: the cut model.
        inputs: example inputs, best real ones; each is run at every batch size, its samples repeated or cut off.
        tolerance: the greatest allowed difference, relative to the range of the output.
        batch_sizes: the batch sizes.

    Raises:
        SpeedupError: the models' outputs differ in structure or shape.
    """
    resized = [with_batch_size(example, size) for example in inputs for size in batch_sizes]
    if not resized:
        raise SpeedupError("there is nothing to verify with", remedy="give at least one example input")
    pairs = [compare(outputs(simulated, each), outputs(sped_up, each)) for each in resized]
    return summarise(pairs, tolerance, batch_sizes)


def summarise(pairs: Sequence[Sequence[Compared]], tolerance: float, batch_sizes: Sequence[int]) -> Verification:
    """The greatest difference of any output tensor over several runs, each compared tensor by tensor."""
    columns = list(zip(*pairs, strict=True))
    differences = [max(each.difference for each in column) for column in columns]
    ranges = [_range(column) for column in columns]
    relatives = [_ratio(d, r) for d, r in zip(differences, ranges, strict=True)]
    worst = max(range(len(relatives)), key=lambda i: relatives[i])
    relative = relatives[worst]
    return Verification(
        max(differences), ranges[worst], relative, tolerance, tuple(batch_sizes), bool(relative <= tolerance)
    )


def _ratio(difference: float, output_range: float) -> float:
    if difference == 0:
        return 0.0
    return difference / output_range if output_range > 0 else float("inf")


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """The tensors that a model gives in eval mode; one that draws there draws the same each time."""
    args, kwargs = as_call(example)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), restored_generators():
            seed_everything(0)
            return tensors_of(model(*args, **kwargs))
    finally:
        for module in training:
            module.training = True


def draws(model: nn.Module, example: Example) -> bool:
    """Whether two forward passes in eval mode give two outputs, of whatever the model draws or counts.

    A cut model draws other numbers, where their shape is cut.
    """
    args, kwargs = as_call(example)
    with torch.no_grad(), restored_generators(), evaluation_mode(model):
        first, second = ([leaf.clone() for leaf in tensors_of(model(*args, **kwargs))] for _ in range(2))
    return len(first) != len(second) or not all(map(_same, first, second))


def _same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or not left.is_floating_point():
        return torch.equal(left, right)
    return torch.allclose(left, right, equal_nan=True)


@dataclass(frozen=True)
class Compared:
    """The greatest difference of two tensors, and the first one's extremes."""

    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0


def _range(column: Sequence[Compared]) -> float:
    low, high = min(each.low for each in column), max(each.high for each in column)
    return high - low if high > low else abs(high)


def compare(simulated: list[Tensor], sped_up: list[Tensor]) -> list[Compared]:
    """Difference and extremes of every output tensor."""
    if [t.shape for t in simulated] != [t.shape for t in sped_up]:
        raise SpeedupError("the sped-up model's outputs have other shapes than the simulated model's")
    found = []
    for left, right in zip(simulated, sped_up, strict=True):
        a, b = left.double(), right.double()
        if a.numel() == 0:
            found.append(Compared())
            continue
        difference = torch.where(a == b, torch.zeros_like(a), (a - b).abs()).max()
        found.append(Compared(float(difference.nan_to_num(nan=float("inf"))), float(a.min()), float(a.max())))
    return found


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output, however it is nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        parts: Sequence[Any] = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = output
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, field.name) for field in fields(output)]
    else:
        return []
    return [tensor for part in parts for tensor in tensors_of(part)]
