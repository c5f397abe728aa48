"""Where a training step's output holds its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from raycomp.core.parts import replace_output
from raycomp.errors import CompressionError


def with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A training step's output with its loss changed: the loss alone, a tuple's first part, or a mapping's "loss".

    Raises:
        CompressionError: there is no loss in it.
    """
    found = False

    def changed(loss: Any) -> Any:
        nonlocal found
        found = isinstance(loss, Tensor)
        return change(loss) if found else loss

    output = replace_output(output, "loss" if isinstance(output, Mapping) else "0", changed)
    if not found:
        raise CompressionError(
            f"training_step returned {type(output).__name__} without a loss",
            remedy="return the loss, (loss, …), or a mapping that holds it as 'loss'",
        )
    return output
