"""Dynamic layerwise distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from raycomp.core.reduction import Statistic, reduce_
from raycomp.core.target import TargetId
from raycomp.distillation.distiller import LayerwiseDistiller


class DynamicLayerwiseDistiller(LayerwiseDistiller):
    """Holds each target against that one of its links that is nearest at the moment.

    loss = λ₀·L + Σ λᵢ·minⱼ dᵢⱼ (Xia et al., Structured Pruning Learns Compact and Accurate Models, arXiv:2204.00408).
    Which link is nearest is judged over the global batch, so every rank takes the same one.
    """

    def combine(self, distances: dict[TargetId, list[Tensor]]) -> dict[TargetId, Tensor]:
        """The distance from the nearest link."""
        choices = {key: links for key, links in distances.items() if len(links) > 1}
        nearest = self._nearest(choices) if choices else {}
        return {target_id: links[nearest.get(target_id, 0)] for target_id, links in distances.items()}

    def _nearest(self, distances: dict[TargetId, list[Tensor]]) -> dict[TargetId, int]:
        merged = {key: torch.stack(links).detach() for key, links in distances.items()}
        reduce_([Statistic(value, "sum") for value in merged.values()])
        return {key: int(value.argmin()) for key, value in merged.items()}
