"""The compressors that are fused on one model, and the moments of a training run that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raycomp.core.attach import TargetSpace, is_wrapped
from raycomp.core.reduction import Statistic, reduce_
from raycomp.errors import CompressionError

if TYPE_CHECKING:
    from raycomp.core.compressor import Compressor
    from raycomp.evaluators.plain import TorchEvaluator

Masks = dict[str, dict[str, Tensor]]
Calibration = dict[str, dict[str, dict[str, Any]]]

_STATE_VERSION = 1


class Chain:
    """Fused compressors in the order in which they were fused, the innermost first.

    One training run serves them all: `run` hooks the optimizers, `loss` lets every compressor add to the loss, and
    after each optimizer step the statistics of all compressors that have a decision to make travel in one flat
    all-reduce.

    Args:
        model: the model under compression, changed in place.

    Raises:
        CompressionError: compressors of another chain stand on the model.
    """

    def __init__(self, model: nn.Module) -> None:
        if is_wrapped(model):
            raise CompressionError(
                "the model is wrapped by another compressor",
                remedy="fuse with it (from_compressor), or take it off first (unwrap_model)",
            )
        self.model = model
        self.evaluator: TorchEvaluator | None = None
        self.space = TargetSpace(model)
        self.compressors: list[Compressor] = []
        self.step = 0
        self.begun = False

    def register(self, compressor: Compressor) -> None:
        """Adds a compressor behind those that are there, and attaches its targets."""
        compressor.attach()
        self.compressors.append(compressor)

    def wrap(self) -> None:
        """Attaches every compressor's targets again after `unwrap`."""
        if not self.space.targets:
            for compressor in self.compressors:
                compressor.attach()

    def unwrap(self) -> None:
        """Commits the masks into the weights as exact zeros and takes everything off the model."""
        for compressor in self.compressors:
            compressor.commit()
        self.space.detach()

    @contextmanager
    def run(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """A training run: within the block every step of the optimizers is a step of the compressors.

        With several optimizers an iteration begins with the first one's step and ends with the last one's.

        Raises:
            CompressionError: no optimizer, or the model is unwrapped.
        """
        if not optimizers:
            raise CompressionError("a training run needs an optimizer")
        self.begin()
        handles = (
            optimizers[0].register_step_pre_hook(lambda *_: self.before_step()),
            optimizers[-1].register_step_post_hook(lambda *_: self.after_step()),
        )
        try:
            with _training(self.compressors):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self.finish()

    def finish(self) -> None:
        """The training has ended without an error."""
        for compressor in self.compressors:
            compressor.finish()

    def begin(self) -> None:
        """Makes the decisions that need no training step; a resumed run has made them.

        Raises:
            CompressionError: the model is unwrapped.
        """
        if not self.space.targets:
            raise CompressionError("the model is unwrapped", remedy="call wrap_model() first")
        if not self.begun:
            self.begun = True
            self._decide()

    def loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The loss that is differentiated: each compressor in turn takes it and may add to it."""
        for compressor in self.compressors:
            loss = compressor.on_loss(loss, batch)
        return loss

    def before_step(self) -> None:
        """The gradients are there, reduced over the workers; the weights are those that gave them."""
        for compressor in self.compressors:
            compressor.before_step(self.step + 1)

    def after_step(self) -> None:
        """The optimizer has stepped: decisions that are due are made, on all ranks alike."""
        self.step += 1
        self._decide()

    def _decide(self) -> None:
        # A quantizer's ranges are those of masked weights, so pruners decide first, wherever they stand in the chain.
        decisive = sorted(self.compressors, key=lambda compressor: compressor.kind == "quantizer")
        due = [compressor for compressor in decisive if compressor.is_due(self.step)]
        statistics: list[Statistic] = [item for compressor in due for item in compressor.statistics()]
        reduce_(statistics)
        for compressor in due:
            compressor.decide(self.step)

    def masks(self) -> Masks:
        """{module: {target: mask}}, 1 = keep, in each target's full shape."""
        return _merged(compressor.get_masks() for compressor in self.compressors)

    def calibration(self) -> Calibration:
        """{module: {target: {scale, zero_point, quant_dtype, …}}} of every quantizer."""
        return _merged(compressor.get_calibration_config() for compressor in self.compressors)

    def folds(self) -> list[tuple[str, ...]]:
        """The module names that one host runs as a single operator, as `fuse_names` gives them."""
        return [names for compressor in self.compressors for names in compressor.folds()]

    def sparsity(self) -> float:
        """The fraction of the masked parameters' and activations' elements that is zero; 0 without masks."""
        masks = [mask for targets in self.masks().values() for mask in targets.values()]
        total = sum(mask.numel() for mask in masks)
        return 1 - sum(float(mask.sum()) for mask in masks) / total if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What the compressors know beside the model's own state dict: the step, schedules, running statistics."""
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "begun": self.begun,
            "compressors": [
                {"class": type(compressor).__name__, "state": compressor.state_dict()}
                for compressor in self.compressors
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; the model's own state dict is loaded beside it.

        Raises:
            CompressionError: the state is of another format or of other compressors.
        """
        saved = [item["class"] for item in state["compressors"]]
        here = [type(compressor).__name__ for compressor in self.compressors]
        if state["version"] != _STATE_VERSION or saved != here:
            raise CompressionError(
                f"the state is version {state['version']} of {saved}, "
                f"these compressors are version {_STATE_VERSION} of {here}"
            )
        self.step, self.begun = state["step"], state["begun"]
        for compressor, item in zip(self.compressors, state["compressors"], strict=True):
            compressor.load_state_dict(item["state"])


@contextmanager
def _training(compressors: Sequence[Compressor]) -> Iterator[None]:
    for compressor in compressors:
        compressor.on_run(True)
    try:
        yield
    finally:
        for compressor in compressors:
            compressor.on_run(False)


def _merged(parts: Any) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for module, targets in part.items():
            merged.setdefault(module, {}).update(targets)
    return merged
