"""The base of quantizers: fake quantization on targets, and folding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycomp.config import QuantizeEntry, QuantizeTarget, nearest
from raycomp.core.chain import Calibration
from raycomp.core.compressor import Compressor
from raycomp.core.selection import Kind, Selected
from raycomp.core.target import Target, TargetId, set_buffer_
from raycomp.errors import CompressionError, ConfigError, Problem
from raycomp.quantization.fake_quantize import FakeQuantize
from raycomp.quantization.fold import fold, fold_problem, folded_weight
from raycomp.quantization.observer import RangeTracker, value_range


class Quantizer(Compressor):
    """Puts fake quantization on its targets, folds what `fuse_names` says, and knows each target's range.

    A subclass says when ranges are taken over. A target on a module that another one hosts is left out: the host's
    output is the output of the whole.
    """

    kind: ClassVar[Kind] = "quantizer"

    def check(self) -> None:
        """Refuses module groups that can't compute as one, and granularities that have no scale."""
        self.quantizers: dict[TargetId, FakeQuantize] = {}
        self.trackers: dict[TargetId, RangeTracker] = {}
        problems = []
        for index, names in self._fuse_names():
            problem = fold_problem(self.model, names, f"config_list[{index}].fuse_names")
            problems += [problem] if problem else []
        problems += self._fused_twice()
        hosted = {name for _, names in self._fuse_names() for name in names[1:]}
        self.selected = {key: item for key, item in self.selected.items() if key.module not in hosted}
        for selected in self.selected.values():
            problems += _granularity_problems(selected)
        if problems:
            raise ConfigError(problems)

    def attach(self) -> None:
        device = next(self.model.parameters()).device
        for target_id, selected in self.selected.items():
            settings = _settings(selected)
            axis = _axis(settings, target_id)
            target = self.chain.space.target(target_id)
            owner = f"{type(self).__name__} {selected.where}"
            quantizer = self.quantizers.setdefault(target_id, FakeQuantize(settings, axis))
            target.claim("quantizer", quantizer.to(device), owner)
            if target.kind != "parameter":
                tracker = self.trackers.setdefault(target_id, RangeTracker(axis))
                target.claim("tracker", tracker.to(device), owner)
        for names in self.folds():
            fold(self.chain.space, names, self._weight_target(names[0]))

    def folds(self) -> list[tuple[str, ...]]:
        """The `fuse_names` of all entries."""
        return [names for _, names in self._fuse_names()]

    def parameter_range(self, target_id: TargetId) -> tuple[Tensor, Tensor]:
        """The range of a parameter target's present values: masked, and folded where the module folds a norm.

        What a mask zeroes doesn't widen the range, because it will not be there.
        """
        target = self.chain.space.targets[target_id]
        module = self.chain.space.module(target_id.module)
        if target.defer_quantizer:
            value = folded_weight(module)
        else:
            value = self.chain.space.parameter(target_id).detach()
            value = value if target.mask is None else target.mask(value)
        return value_range(value, self.quantizers[target_id].axis)

    def get_calibration_config(self) -> Calibration:
        """{module: {target: {scale, zero_point, quant_dtype, …}}} of the targets that have a range."""
        calibration: Calibration = {}
        for target_id, quantizer in self.quantizers.items():
            if quantizer.active and quantizer.settings.apply_method != "bypass":
                calibration.setdefault(target_id.module, {})[target_id.target] = quantizer.calibration()
        return calibration

    def update_calibration_config(self, calibration: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Takes over ranges that were stored before.

        Raises:
            CompressionError: a target that this quantizer doesn't have.
        """
        for module, targets in calibration.items():
            for target, values in targets.items():
                target_id = TargetId(module, target)
                if target_id not in self.quantizers:
                    message, remedy = f"{type(self).__name__} has no such target", map(str, self.quantizers)
                    raise CompressionError(message, where=str(target_id), remedy=nearest(str(target_id), remedy))
                quantizer = self.quantizers[target_id]
                quantizer.set_range(torch.as_tensor(values["tracked_min"]), torch.as_tensor(values["tracked_max"]))
                for name in ("scale", "zero_point"):
                    set_buffer_(quantizer, name, torch.as_tensor(values[name]))
                quantizer.active = True

    def result(self) -> tuple[nn.Module, Calibration]:
        """The model and its calibration config."""
        return self.model, self.get_calibration_config()

    def _weight_target(self, host: str) -> Target | None:
        return self.chain.space.targets.get(TargetId(host, "weight"))

    def _fused_twice(self) -> list[Problem]:
        first = {name: str(type(c).__name__) for c in self.chain.compressors for names in c.folds() for name in names}
        problems = []
        for index, names in self._fuse_names():
            where = f"config_list[{index}].fuse_names"
            problems += [Problem(where, f"{name} is fused already by {first[name]}") for name in names if name in first]
            first |= dict.fromkeys(names, where)
        return problems

    def _fuse_names(self) -> list[tuple[int, tuple[str, ...]]]:
        entries = [(index, entry) for index, entry in enumerate(self.entries) if isinstance(entry, QuantizeEntry)]
        return [(index, tuple(names)) for index, entry in entries for names in entry.fuse_names]


def _settings(selected: Selected) -> QuantizeTarget:
    assert isinstance(selected.settings, QuantizeTarget)
    return selected.settings


def _axis(settings: QuantizeTarget, target_id: TargetId) -> int | None:
    if settings.granularity in ("out_channel",):
        return 0
    if settings.granularity in ("in_channel", "per_channel"):
        return 1
    return None


def _granularity_problems(selected: Selected) -> list[Problem]:
    granularity = _settings(selected).granularity
    if isinstance(granularity, str):
        return []
    where = f"{selected.where}.granularity"
    remedy = "out_channel, in_channel, per_channel or default"
    return [Problem(where, f"{granularity} is not a granularity of scales", remedy)]
