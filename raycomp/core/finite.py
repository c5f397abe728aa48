"""Losses, gradients, weights and statistics are finite numbers, or the run stops and says where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils import _pytree as pytree

from raycomp.core.reduction import Statistic
from raycomp.core.selection import module_names
from raycomp.errors import NotFiniteError

THE_BATCH = "the batch"
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


def check_statistics(statistics: Iterable[Statistic], step: int) -> None:
    """Refuses merged statistics that rest on values that are not finite: the same on every rank.

    Raises:
        NotFiniteError: with the statistics' names.
    """
    every = list(statistics)
    # One wait for the device, whatever their number.
    sense = [_has_sense(each).all() for each in every]
    if not sense or bool(torch.stack(sense).all()):
        return
    bad = [each.name or "a statistic" for each, has_sense in zip(every, sense, strict=True) if not has_sense]
    raise NotFiniteError(f"in step {step} {_listed(dict.fromkeys(bad))} is not finite")


def _has_sense(statistic: Statistic) -> Tensor:
    """Where a statistic is finite; the least and greatest of nothing are +inf and -inf."""
    value = statistic.tensor
    if statistic.operation == "min":
        return value > -torch.inf
    if statistic.operation == "max":
        return value < torch.inf
    return torch.isfinite(value)


def weights_error(weights: Mapping[str, Tensor], step: int) -> NotFiniteError:
    """The error for weights that an optimizer's step has made infinite or no number."""
    return NotFiniteError(f"after step {step} {_listed(_bad(weights))} is not finite")


def gradients_error(
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
    found = [place for each in passes if each.run is not None for place in [_first_place(model, each.run)] if place]
    return found[0] if found else next(iter(losses), None)


def _first_place(model: nn.Module, run: Callable[[], Any]) -> str | None:
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
