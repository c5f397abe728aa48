"""ADMM pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raycomp.config.entries import Granularity
from raycomp.core.batch_share import weighted_by_samples
from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.model import device_of
from raycomp.core.moments import Moment
from raycomp.core.target import TargetId
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.saliency import l2_norm
from raycomp.pruning.schedule import RoundEnds, Schedule, at_once


class ADMMPruner(Pruner):
    """Draws the weights towards sparse ones while they train, and prunes the blocks that are smallest then.

    In each of `iterations` rounds of `training_epochs` epochs the loss has the term rho/2 · Σ ‖W − Z + U‖²; at the end
    of a round Z becomes W + U with its smallest blocks set to zero, and U += W − Z. After the last one the blocks with
    the smallest L2 norm are masked for good, and one more round, as long as the user says, trains what is left. A
    threshold is an L2 norm (Zhang et al., A Systematic DNN Weight Pruning Framework using Alternating Direction Method
    of Multipliers, arXiv:1804.03294).

    Args:
        model: the model, changed in place.
        config_list: see `PruneEntry`.
        evaluator: how to train.
        iterations: rounds before the masks.
        training_epochs: how long each of them is.
        rho: the weight of the term.
        granularity: of targets that don't say their own: single weights (`fine-grained`) or output channels
            (`coarse-grained`).
    """

    fusion_order = ("iterations", "training_epochs", "granularity", "evaluator", "rho")

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        iterations: int = 3,
        training_epochs: int = 1,
        rho: float = 1e-4,
        granularity: Literal["fine-grained", "coarse-grained"] = "fine-grained",
    ) -> None:
        self.granularity = granularity
        self.default_granularity = self.granularity_under(self)
        self.iterations = iterations
        self.training_epochs = training_epochs
        self.rho = rho
        self.sparse: dict[TargetId, Tensor] = {}
        """Z of each target."""
        self.gap: dict[TargetId, Tensor] = {}
        """U of each target."""
        super().__init__(model, config_list, evaluator)

    @classmethod
    def granularity_under(cls, settings: Any) -> Granularity:
        return (1,) if settings.granularity == "fine-grained" else "out_channel"

    def own_schedule(self) -> Schedule:
        return RoundEnds(self.iterations, at_once, from_first_weights=False, first_round=self.chain.round)

    @property
    def first_round(self) -> int:
        """The round in which it begins."""
        assert isinstance(self.schedule, RoundEnds)
        return self.schedule.first_round

    def epochs_of(self, round: int) -> int | None:
        return self.training_epochs if self.first_round <= round < self.first_round + self.iterations else None

    def loss_term(self, batch: Any) -> Tensor | None:
        """rho/2 · Σ ‖W − Z + U‖²."""
        if not self.sparse:
            return None
        space = self.chain.space
        squares = [(space.parameter(key) - self.sparse[key] + self.gap[key]).square().sum() for key in self.sparse]
        return weighted_by_samples(self.rho / 2 * torch.stack(squares).sum())

    def is_due(self, moment: Moment) -> bool:
        return super().is_due(moment) or (moment.event == "begin" and moment.round == self.first_round)

    def decide(self, moment: Moment) -> None:
        progress = self.schedule.progress(moment)
        if moment.event == "begin" and moment.round == self.first_round:
            self._begin()
        elif progress is not None and progress < 1:
            self._project()
        elif progress is not None:
            self.set_masks(self.saliencies(), progress)
            self.sparse, self.gap = {}, {}
        self.follow()

    def saliencies(self) -> dict[TargetId, Tensor]:
        """The L2 norm of each block of the weights."""
        return {key: l2_norm(self._weight(key), self.blocks(key)) for key in self.goals}

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {str(key): value.clone() for key, value in tensors.items()}
            for name, tensors in (("sparse", self.sparse), ("gap", self.gap))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device, named = device_of(self.model), {str(key): key for key in self.goals}
        self.sparse = {named[key]: value.to(device) for key, value in state["sparse"].items()}
        self.gap = {named[key]: value.to(device) for key, value in state["gap"].items()}

    def _begin(self) -> None:
        self.sparse = {key: self._weight(key).clone() for key in self.goals}
        self.gap = {key: torch.zeros_like(value) for key, value in self.sparse.items()}

    def _project(self) -> None:
        sums = {key: self._weight(key) + self.gap[key] for key in self.goals}
        masks = self.made_masks({key: l2_norm(value, self.blocks(key)) for key, value in sums.items()}, 1.0)
        for key, value in sums.items():
            self.sparse[key] = value * masks[key].to(value)
            self.gap[key] = value - self.sparse[key]

    def _weight(self, target_id: TargetId) -> Tensor:
        return self.chain.space.parameter(target_id).detach()
