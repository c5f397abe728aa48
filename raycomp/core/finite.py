"""Losses, gradients, weights and statistics are finite numbers, or the run stops and says where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from raycomp.core.attach import TargetSpace
from raycomp.core.first_place import first_place
from raycomp.core.learned import LearnedTensors
from raycomp.core.moments import Moment
from raycomp.core.reduction import Statistic
from raycomp.errors import NotFiniteError

_SHOWN = 4


@dataclass(frozen=True)
class Pass:
    """A forward pass whose gradients have not yet been used.

    Args:
        run: repeats it.
        losses: what was added up to its loss, by who gave it.
    """

    run: Callable[[], Any] | None
    losses: dict[str, Tensor] = field(default_factory=dict)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries of all tensors are finite. Waits for the device once."""
    dense = [tensor._values() if tensor.is_sparse else tensor for tensor in tensors]
    # The greatest magnitude, which a Euclidean norm of finite entries may exceed float32 by.
    return bool(torch.isfinite(get_total_norm([each for each in dense if each.numel()], torch.inf)))


def spreading(loss: Tensor) -> Tensor:
    """The loss, whose gradients are no numbers where it is none itself.

    One rank's infinite loss may have finite gradients. Gradients are reduced, so this way all ranks hear of it.
    """
    return loss * (1 + 0 * loss.detach())


def check_statistics(statistics: Iterable[Statistic], moment: Moment) -> None:
    """Refuses statistics, merged for a moment, that rest on values that are not finite: the same on every rank.

    Raises:
        NotFiniteError: with the statistics' names.
    """
    every = list(statistics)
    # One wait for the device, whatever their number.
    sense = [_has_sense(each).all() for each in every]
    if not sense or bool(torch.stack(sense).all()):
        return
    bad = [each.name or "a statistic" for each, has_sense in zip(every, sense, strict=True) if not has_sense]
    names = _listed(dict.fromkeys(bad))
    if moment.event == "calibrated":
        remedy = "look at the batches that it calibrates on, and at the model's output for them"
        raise NotFiniteError(f"in the calibration {names} is not finite", remedy=remedy)
    raise NotFiniteError(f"in step {moment.step} {names} is not finite")


def _has_sense(statistic: Statistic) -> Tensor:
    """Where a statistic is finite; the least and greatest of nothing are +inf and -inf."""
    value = statistic.tensor
    if statistic.operation == "min":
        return value > -torch.inf
    if statistic.operation == "max":
        return value < torch.inf
    return torch.isfinite(value)


class FiniteRun:
    """Whether what a run trains stays finite.

    Args:
        space: of the model.
        learned: what compressors learn.
    """

    def __init__(self, space: TargetSpace, learned: LearnedTensors) -> None:
        self._space, self._learned = space, learned
        self._optimizers: Sequence[Optimizer] = ()
        self._passes: list[Pass] = []
        self._finite_buffers: frozenset[str] = frozenset()

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """A run with these optimizers begins."""
        self._optimizers, self._passes = optimizers, []
        self._finite_buffers = frozenset(name for name, value in self._buffers().items() if are_finite([value]))

    def begin_step(self) -> None:
        """No gradient is left of what passed before."""
        self._passes = []

    def passed(self, each: Pass) -> None:
        """A forward pass whose gradients the next step will use."""
        self._passes.append(each)

    def check_gradients(self, step: int) -> None:
        """Refuses gradients that are not finite, on all ranks alike, before an optimizer uses them.

        Args:
            step: the optimizer step, counted from 1.

        Raises:
            NotFiniteError: with the place where it began.
        """
        # A GradScaler's optimizer is told itself of infinite gradients, and then makes no step.
        scaled = any(getattr(optimizer, "found_inf", None) is not None for optimizer in self._optimizers)
        gradients = [weight.grad for weight in self._trained() if weight.grad is not None]
        if not scaled and not are_finite(gradients):
            raise _gradients_error(self._space.model, self._by_name(), self._passes, step)
        self._passes = []

    def check_weights(self, step: int) -> None:
        """Refuses weights that an optimizer's step has made infinite or no number, and statistics that were finite.

        Raises:
            NotFiniteError: with their names.
        """
        buffers = {name: value for name, value in self._buffers().items() if name in self._finite_buffers}
        if not are_finite([*self._trained(), *buffers.values()]):
            raise NotFiniteError(f"after step {step} {_listed(_bad({**self._by_name(), **buffers}))} is not finite")

    def _trained(self) -> list[Tensor]:
        return [*held_by(self._optimizers), *self._learned.tensors()]

    def _buffers(self) -> dict[str, Tensor]:
        """The floating-point buffers of the model as the user wrote it."""
        with self._space.as_written():
            named = dict(self._space.model.named_buffers())
        return {name: value for name, value in named.items() if value.is_floating_point()}

    def _by_name(self) -> dict[str, Tensor]:
        held = {id(parameter) for parameter in held_by(self._optimizers)}
        with self._space.as_written():
            named = {name: weight for name, weight in self._space.model.named_parameters() if id(weight) in held}
        learned = {f"learned tensor {number}": tensor for number, tensor in enumerate(self._learned.tensors())}
        return {**named, **learned}


def held_by(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """The trainable parameters that optimizers hold."""
    every = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in every if parameter.requires_grad]


def _gradients_error(
    model: nn.Module, weights: Mapping[str, Tensor], passes: Sequence[Pass], step: int
) -> NotFiniteError:
    """The error for gradients that are not finite: where that began is found by repeating the forward passes.

    Args:
        model: what trains; under DDP every rank must call this.
        weights: what the optimizers hold, by name.
        passes: those whose gradients the step would use.
        step: the optimizer step, counted from 1.
    """
    losses = {name: value for each in passes for name, value in each.losses.items() if not _is_finite(value)}
    what = " and ".join(losses) or f"the gradient of {_listed(_bad(_gradients(weights)))}"
    verb = "are" if len(losses) > 1 else "is"
    return NotFiniteError(f"in step {step} {what} {verb} not finite", began=_began(model, weights, passes, losses))


def _began(
    model: nn.Module, weights: Mapping[str, Tensor], passes: Sequence[Pass], losses: Mapping[str, Tensor]
) -> str | None:
    if not are_finite(weights.values()):
        return f"the weights: {_listed(_bad(weights))}"
    found = [place for each in passes if each.run is not None for place in [first_place(model, each.run)] if place]
    return found[0] if found else next(iter(losses), None)


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _gradients(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def _bad(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not are_finite([value])]


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
