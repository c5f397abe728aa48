"""Post-training quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raycomp.core.chain import Chain
from raycomp.core.compressor import ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.moments import Moment
from raycomp.core.target import TargetId
from raycomp.quantization.quantizer import Quantizer
from raycomp.quantization.range_watcher import RangeWatcher


class PtqQuantizer(Quantizer):
    """Takes the ranges of activations from a pass over training data, in evaluation mode; no weight changes.

    An activation's range is the least and the greatest value that passed, over all workers; a parameter's the one that
    it has (Jacob et al., CVPR 2018, section 3). Fused with what trains, it calibrates what was trained.

    Args:
        model: the model, changed in place.
        config_list: see `QuantizeEntry`.
        evaluator: how to calibrate.
        calibration_steps: batches to calibrate on; None for one pass over the training data.
    """

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        calibration_steps: int | None = None,
    ) -> None:
        self._calibration_steps = calibration_steps
        super().__init__(model, config_list, evaluator)

    @property
    def calibrates(self) -> bool:
        return True

    @property
    def calibration_steps(self) -> int | None:
        return self._calibration_steps

    def make_watcher(self, target_id: TargetId) -> RangeWatcher:
        return RangeWatcher(str(target_id), self.quantizers[target_id].axis, "calibration")

    def is_due(self, moment: Moment) -> bool:
        return moment.event == "calibrated"

    @torch.no_grad()
    def decide(self, moment: Moment) -> None:
        """Takes over the merged ranges."""
        for target_id, watcher in self.watchers.items():
            quantizer = self.quantizers[target_id]
            if watcher.has_seen:
                quantizer.set_range(watcher.low, watcher.high)
                quantizer.active = True
            watcher.reset()
        self.set_parameter_ranges(active=True)

    def state_dict(self) -> dict[str, Any]:
        """Nothing that is gathered: a calibration that was cut off begins anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def notes(self) -> list[str]:
        return super().notes() if self.chain.calibrated else []
