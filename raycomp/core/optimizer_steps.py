"""Optimizer steps of the user's, with what is due before and after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from raycomp.errors import CompressionError


@contextmanager
def around_steps(
    optimizers: Sequence[Optimizer], before: Callable[[], None], after: Callable[[], None]
) -> Iterator[None]:
    """Within the block, `before` runs when a step's gradients are there, and `after` when the step is made.

    With several optimizers an iteration begins with the first one's step and ends with the last one's. A step that is
    given a closure has its gradients once that has run. A step that calls its parent class's is one step.

    Raises:
        CompressionError: from a step whose optimizer evaluates its closure several times.
    """

    # torch runs the hooks in every class's `step`: in a subclass's, and in the parent's that it calls.
    depth = dict.fromkeys(map(id, optimizers), 0)

    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        depth[id(optimizer)] += 1
        if depth[id(optimizer)] > 1 or optimizer is not optimizers[0]:
            return None
        _, *positional = args  # The first is the optimizer itself.
        closure = kwargs.get("closure", positional[0] if positional else None)
        if closure is None:
            before()
            return None
        followed = _followed(closure, before)
        return ((optimizer, followed), kwargs) if positional else (args, {**kwargs, "closure": followed})

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        depth[id(optimizer)] -= 1
        if not depth[id(optimizer)] and optimizer is optimizers[-1]:
            after()

    handles = [
        handle
        for optimizer in optimizers
        for handle in (optimizer.register_step_pre_hook(before_step), optimizer.register_step_post_hook(after_step))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _followed(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    """The closure with `then` behind it, to be evaluated once."""
    ran = False

    def followed() -> Any:
        nonlocal ran
        if ran:
            message = "the optimizer evaluates its closure several times in a step"
            raise CompressionError(message, remedy="use one that takes a step per gradient, such as SGD or AdamW")
        ran = True
        result = closure()
        then()
        return result

    return followed
