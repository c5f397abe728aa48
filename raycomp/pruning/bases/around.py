"""What stands around a basic pruner and hands on to it what isn't its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import evaluator_problems, keep_evaluator, setting_problems
from raycomp.core.evaluator import Evaluator
from raycomp.core.masks import Masks
from raycomp.core.public import Public
from raycomp.errors import Problem
from raycomp.pruning.pruner import Pruner


class AroundPruner(Public, ABC):
    """Drives a basic pruner: it stays the one in the chain, and what is fused sees its masks.

    Args:
        pruner: the basic pruner that ranks and masks.
        evaluator: how to train, where the pruner has no evaluator yet.

    Raises:
        ConfigError: with everything that is wrong in the arguments: `pruner` is no basic pruner, say.
    """

    @classmethod
    def argument_problems(cls, arguments: Mapping[str, Any]) -> Iterator[Problem]:
        pruner = arguments.get("pruner")
        if "pruner" in arguments and not isinstance(pruner, Pruner):
            message = f"it goes around a pruner, not a {type(pruner).__name__}"
            remedy = "write L1NormPruner(model, config_list, evaluator) or another basic pruner first"
            yield Problem(cls.__name__, message, remedy)
            return
        yield from evaluator_problems(cls, arguments)
        yield from setting_problems(cls, arguments)

    @abstractmethod
    def __init__(self, pruner: Pruner, evaluator: Evaluator | None = None) -> None:
        self.pruner = pruner
        keep_evaluator(pruner.chain, evaluator)

    @classmethod
    def from_compressor(cls, compressor: Pruner, *args: Any, **kwargs: Any) -> Self:
        """The same as the constructor: it goes around the pruner that it is given."""
        return cls(compressor, *args, **kwargs)

    @property
    def chain(self) -> Chain:
        """The fused compressors."""
        return self.pruner.chain

    @property
    def evaluator(self) -> Evaluator | None:
        """How to train."""
        return self.pruner.evaluator

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """One training run, without a length until the goal is reached; returns the model and its masks."""
        return self.pruner.compress(max_steps, max_epochs)  # type: ignore[no-any-return]

    @property
    def model(self) -> nn.Module:
        """The model under compression."""
        return self.pruner.model

    def as_written(self) -> AbstractContextManager[None]:
        """As `Compressor.as_written`."""
        return self.pruner.as_written()

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """As `Compressor.track_forward`."""
        self.pruner.track_forward(*args, **kwargs)

    def update_masks(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """As `Pruner.update_masks`."""
        self.pruner.update_masks(masks)

    def get_masks(self) -> Masks:
        """{module: {target: mask}}; 1 = keep."""
        return self.pruner.get_masks()

    def wrap_model(self) -> None:
        """Attaches all fused compressors' targets again."""
        self.chain.wrap()

    def unwrap_model(self) -> None:
        """Commits the masks into the weights and takes all fused compressors off the model."""
        self.chain.unwrap()
