"""Quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.moments import Moment
from raycomp.core.target import TargetId
from raycomp.quantization.functional import moving_average
from raycomp.quantization.quantizer import Quantizer
from raycomp.quantization.range_watcher import RangeWatcher


class QATQuantizer(Quantizer):
    """Trains with fake quantization in the forward pass and the straight-through gradient in the backward pass.

    Activations keep a moving average (0.99) of each step's range over the global batch, parameters the range that they
    have (Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018). The ranges of all targets and workers merge once, after each optimizer step, so a step quantizes
    activations by what the steps before it have seen, and the first one not at all. What unquantized steps saw serves
    until a quantized one has passed; with that one the average begins.

    Args:
        model: the model, changed in place.
        config_list: see `QuantizeEntry`.
        evaluator: how to train.
        quant_start_step: optimizer steps before which ranges are only watched.
    """

    fusion_order = ("quant_start_step", "evaluator")

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        quant_start_step: int = 0,
    ) -> None:
        self.quant_start_step = quant_start_step
        self._averaged: set[TargetId] = set()
        super().__init__(model, config_list, evaluator)

    @property
    def rounds(self) -> int:
        return 1

    def is_due(self, moment: Moment) -> bool:
        # At a round's end as well: masks that are set there change the ranges of weights.
        return moment.event != "calibrated"

    @torch.no_grad()
    def decide(self, moment: Moment) -> None:
        """Takes over the merged ranges."""
        started = moment.step >= self.quant_start_step
        for target_id, watcher in self.watchers.items():
            quantizer = self.quantizers[target_id]
            if watcher.has_seen:
                quantizer.set_range(*self._averages(target_id, watcher))
            watcher.reset()
            quantizer.active = started and bool(torch.isfinite(quantizer.tracked_min).all())
        self.set_parameter_ranges(active=started)

    def take_over(self, target_id: TargetId, numbers: Mapping[str, Tensor]) -> None:
        """Takes over a stored range; an average goes on from it."""
        super().take_over(target_id, numbers)
        if target_id in self.watchers:
            self._averaged.add(target_id)

    def rewind(self) -> None:
        super().rewind()
        self._averaged.clear()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "averaged": sorted(map(str, self._averaged))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._averaged = {target_id for target_id in self.watchers if str(target_id) in state["averaged"]}

    def _averages(self, target_id: TargetId, watcher: RangeWatcher) -> tuple[Tensor, Tensor]:
        """The range with what the watcher has seen; it alone where that is the first of a quantized forward pass."""
        quantizer = self.quantizers[target_id]
        if quantizer.active and target_id not in self._averaged:
            self._averaged.add(target_id)
            return watcher.low, watcher.high
        low = moving_average(quantizer.tracked_min.to(watcher.low), watcher.low)
        high = moving_average(quantizer.tracked_max.to(watcher.high), watcher.high)
        return low, high
