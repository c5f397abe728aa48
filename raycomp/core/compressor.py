"""The base of pruners, quantizers and distillers: construction, fusion, and the moments at which one acts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from raycomp.config import SelectionEntry, parse_config_list
from raycomp.core.chain import Calibration, Chain, Masks
from raycomp.core.reduction import Statistic
from raycomp.core.selection import Kind, Selected, resolve
from raycomp.errors import CompressionError, ConfigError, Problem
from raycomp.evaluators.plain import TorchEvaluator

ConfigList = Sequence[Mapping[str, Any] | SelectionEntry]


class Compressor:
    """Compresses a model while the user's training runs.

    Constructing one attaches its targets to the model, so learned parameters exist before DDP and the optimizer do.
    A subclass says at which moments it acts by overriding them; what it doesn't override does nothing.

    Args:
        model: the model, changed in place; or a `Chain`, to fuse with the compressors on it (see `from_compressor`).
        config_list: dicts that select modules and say how to compress their targets.
        evaluator: how to train; needed by `compress` where the algorithm needs training.

    Raises:
        ConfigError: with everything that is wrong in the config list.
    """

    kind: ClassVar[Kind]

    def __init__(
        self, model: nn.Module | Chain, config_list: ConfigList, evaluator: TorchEvaluator | None = None
    ) -> None:
        self.chain = model if isinstance(model, Chain) else Chain(model)
        self.entries = parse_config_list(self.kind, config_list, where="config_list")
        self.selected = resolve(self.chain.model, self.kind, self.entries, where="config_list")
        self.chain.evaluator = self.chain.evaluator or evaluator
        self.check()
        self.chain.register(self)

    @classmethod
    def from_compressor(cls, compressor: Compressor, config_list: ConfigList, *args: Any, **kwargs: Any) -> Self:
        """A compressor fused with `compressor` and all that is fused with it already.

        Its other arguments are those of the class. The evaluator of the earlier compressors is kept; one given here is
        used only where they have none.
        """
        return cls(compressor.chain, config_list, *args, **kwargs)  # type: ignore[arg-type]

    @property
    def model(self) -> nn.Module:
        """The model under compression."""
        return self.chain.model

    @property
    def evaluator(self) -> TorchEvaluator | None:
        """How all fused compressors train."""
        return self.chain.evaluator

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        """Runs one training run for all fused compressors; returns what `result` says.

        Args:
            max_steps, max_epochs: how long, handed to the evaluator's training function. Without them a compressor that
                needs no training doesn't train, and a pruner alone trains until its last decision.

        Raises:
            CompressionError: there is no evaluator, and a length is given or a fused compressor needs training.
        """
        needing = [compressor for compressor in self.chain.compressors if compressor.needs_training]
        unlimited = max_steps is None and max_epochs is None
        if unlimited and not needing:
            self.chain.begin()
            self.chain.finish()
        elif self.evaluator is None:
            names = ", ".join(type(compressor).__name__ for compressor in needing) or "training"
            raise CompressionError(f"{names} needs an evaluator", remedy="pass a TorchEvaluator")
        else:
            if unlimited and len(self.chain.compressors) == 1:
                max_steps = self.steps_to_go()
            self.evaluator.train(self.chain, max_steps, max_epochs)
        return self.result()

    def wrap_model(self) -> None:
        """Attaches all fused compressors' targets again after `unwrap_model`."""
        self.chain.wrap()

    def unwrap_model(self) -> None:
        """Commits the masks into the weights and takes all fused compressors off the model."""
        self.chain.unwrap()

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model once on an example, without gradients and in evaluation mode.

        Afterwards masks of inputs and outputs have the rank that they apply to.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    # What a subclass says of itself.

    @property
    def needs_training(self) -> bool:
        """Whether it can't do its work without training steps."""
        return True

    def steps_to_go(self) -> int | None:
        """The optimizer steps until its last decision; None where the user says how long."""
        return None

    def check(self) -> None:
        """Refuses what can't work, before anything is attached (ConfigError)."""

    def result(self) -> Any:
        """What `compress` returns."""
        return self.model

    def folds(self) -> list[tuple[str, ...]]:
        """The module groups that this compressor runs as one operator."""
        return []

    def get_masks(self) -> Masks:
        """The masks of this compressor's targets."""
        return {}

    def get_calibration_config(self) -> Calibration:
        """The scales of this compressor's targets."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that resume this compressor exactly, beside the model's state dict."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`."""

    # The moments, in the order of a run.

    def attach(self) -> None:
        """Claims slots of the targets; called at construction and by `wrap_model`."""

    def on_run(self, running: bool) -> None:
        """A training run begins or ends."""

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The forward pass of one (micro-)batch is done; returns the loss to differentiate."""
        return loss

    def before_step(self, step: int) -> None:
        """The gradients of optimizer step `step` (counted from 1) are reduced and not yet used."""

    def is_due(self, step: int) -> bool:
        """Whether a decision is to be made after `step` optimizer steps (0: before the first)."""
        return False

    def statistics(self) -> list[Statistic]:
        """What a due decision rests on; merged over all workers, in place, before `decide`."""
        return []

    def decide(self, step: int) -> None:
        """Makes the due decision from the merged statistics."""

    def finish(self) -> None:
        """The training run has ended without an error."""

    def commit(self) -> None:
        """Writes into the weights what must outlive the targets."""

    def problem(self, selected: Selected, message: str, remedy: str = "") -> ConfigError:
        """An error about one selected target."""
        return ConfigError([Problem(selected.where, f"{selected.target_id}: {message}", remedy)])
