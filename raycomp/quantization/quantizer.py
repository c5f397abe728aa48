"""The base of quantizers: fake quantization on targets, and folding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycomp.config import QuantizeEntry, QuantizeTarget, nearest
from raycomp.core.calibration import NUMBERS, canonical_calibration, varies_along
from raycomp.core.chain import Chain
from raycomp.core.compressor import Compressor, ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.layout import traced_shapes
from raycomp.core.model import device_of
from raycomp.core.moments import Calibration, Moment, Turn
from raycomp.core.reduction import Statistic
from raycomp.core.selection import Kind, Selected
from raycomp.core.target import Target, TargetId, set_buffer_
from raycomp.errors import CompressionError, ConfigError, FoldError, Problem
from raycomp.quantization.fake_quantize import FakeQuantize
from raycomp.quantization.fold import fold, fold_problem, folded_weight, is_activation
from raycomp.quantization.granularity import by_group, granularity_problem, scale_layout
from raycomp.quantization.range_watcher import RangeWatcher, group_range, value_range


class Quantizer(Compressor):
    """Puts fake quantization on its targets, folds what `fuse_names` says, and knows each target's range.

    A subclass says when ranges are taken over. A target on a module that another one hosts is left out: the host's
    output is the output of the whole.
    """

    kind: ClassVar[Kind] = "quantizer"
    turn: ClassVar[Turn] = Turn.RANGES

    def __init__(self, model: nn.Module | Chain, config_list: ConfigList, evaluator: Evaluator | None = None) -> None:
        self.quantizers: dict[TargetId, FakeQuantize] = {}
        self.watchers: dict[TargetId, RangeWatcher] = {}
        self._folded_ranges: dict[TargetId, tuple[Tensor, Tensor]] = {}
        super().__init__(model, config_list, evaluator)

    # What a subclass says.

    @abstractmethod
    def is_due(self, moment: Moment) -> bool:
        """Whether ranges are taken over at this moment."""

    @abstractmethod
    def decide(self, moment: Moment) -> None:
        """Takes over the merged ranges."""

    def make_quantizer(self, target_id: TargetId) -> FakeQuantize:
        """The module that quantizes a target."""
        settings, layout = _settings(self.selected[target_id]), self.layouts[target_id]
        return FakeQuantize(settings, *scale_layout(settings.granularity, layout))

    def make_watcher(self, target_id: TargetId) -> RangeWatcher:
        """The module that watches an input or output."""
        return RangeWatcher(str(target_id), self.quantizers[target_id].axis)

    def check(self) -> None:
        """Refuses module groups that can't compute as one, and granularities that have no scale."""
        problems = []
        for index, names in self._fuse_names():
            problem = fold_problem(self.model, names, f"config_list[{index}].fuse_names")
            problems += [problem] if problem else []
        problems += self._fused_twice()
        problems += self._quantized_twice()
        hosted = {name for _, names in self._fuse_names() for name in names[1:]}
        self.selected = {key: item for key, item in self.selected.items() if key.module not in hosted}
        for target_id, selected in self.selected.items():
            granularity, layout = _settings(selected).granularity, self.layouts[target_id]
            groups = getattr(self.chain.space.module(target_id.module), "groups", 1)
            unfit = granularity_problem(granularity, target_id, layout, groups)
            problems += [Problem(f"{selected.where}.granularity", *unfit)] if unfit else []
        if problems:
            raise ConfigError(problems)

    # The moments.

    def attach(self) -> None:
        device = device_of(self.model)
        for target_id, selected in self.selected.items():
            target = self.chain.space.target(target_id)
            if target_id not in self.quantizers:
                self.quantizers[target_id] = self.make_quantizer(target_id).to(device)
                if target.kind != "parameter":
                    self.watchers[target_id] = self.make_watcher(target_id)
            target.set_quantizer(self.quantizers[target_id], f"{type(self).__name__} {selected.where}")
            if target_id in self.watchers:
                target.add("watchers", self.watchers[target_id])
        for names in self.folds():
            fold(self.chain.space, names, self._weight_target(names[0]))

    @torch.no_grad()
    def statistics(self) -> list[Statistic]:
        """The watched ranges, and those of folded weights: weights are the same on every rank, but the running
        statistics that a folded one is multiplied by need not be."""
        watched = self.running_statistics()
        folded = [key for key in self.quantizers if self.chain.space.targets[key].defer_quantizer]
        self._folded_ranges = {key: self.parameter_range(key) for key in folded}
        for key, (low, high) in self._folded_ranges.items():
            watched += [Statistic(low, "min", f"range of {key}"), Statistic(high, "max", f"range of {key}")]
        return watched

    def rewind(self) -> None:
        for target_id in self.watchers:
            self.quantizers[target_id].reset()

    def running_statistics(self) -> list[Statistic]:
        return [statistic for watcher in self.watchers.values() for statistic in watcher.statistics()]

    def set_parameter_ranges(self, *, active: bool) -> None:
        """Takes over the ranges that the parameters have now."""
        for target_id in self.quantizers.keys() - self.watchers.keys():
            low, high = self._folded_ranges.get(target_id) or self.parameter_range(target_id)
            self.quantizers[target_id].set_range(low, high)
            self.quantizers[target_id].active = active

    def notes(self) -> list[str]:
        unseen = [str(key) for key in self.watchers if not torch.isfinite(self.quantizers[key].tracked_min).all()]
        if not unseen:
            return []
        message = f"no training step passed {', '.join(unseen)}: not quantized"
        remedy = "does the training use the given training_step? activation checkpointing needs use_reentrant=False"
        return [f"{type(self).__name__}: {message} ({remedy})"]

    def state_dict(self) -> dict[str, Any]:
        return {"gathered": {str(key): watcher.gathered_state() for key, watcher in self.watchers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, watcher in self.watchers.items():
            watcher.load_gathered(state["gathered"][str(key)], device_of(self.model))

    def rehearse(self) -> None:
        """Runs the example through what is fused: modules that aren't each given what the one before gives are told."""
        if not self.folds() or self.chain.example is None:
            return
        try:
            traced_shapes(self.model, (), self.chain.example)
        except FoldError as error:
            index = next(index for index, names in self._fuse_names() if names == error.names)
            where = f"config_list[{index}].fuse_names"
            raise ConfigError([Problem(where, error.message, error.remedy or "")]) from None

    # What it has to give.

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
            value = target.masked(self.chain.space.parameter(target_id)).detach()
        layout, granularity = self.layouts[target_id], _settings(self.selected[target_id]).granularity
        if by_group(granularity, layout):
            return group_range(value, layout.channel_dim or 0, layout.groups)
        return value_range(value, self.quantizers[target_id].axis)

    def get_calibration_config(self) -> Calibration:
        """{module: {target: {scale, zero_point, quant_dtype, …}}} of the targets that have a range."""
        return _calibration({key: each for key, each in self.quantizers.items() if each.active})

    def blank_calibration(self) -> Calibration:
        """The calibration's form, as it is before there are ranges: every target, with scales of 1."""
        found = _calibration(self.quantizers)
        for values in (values for targets in found.values() for values in targets.values()):
            del values["tracked_min"], values["tracked_max"]
        return found

    def update_calibration_config(self, calibration_config: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Takes over ranges that were stored before: all of them, or none.

        Raises:
            CompressionError: a target that this quantizer doesn't have, or a value that is missing or not right there.
        """
        settings = {key: quantizer.said() for key, quantizer in self.quantizers.items()}
        given = canonical_calibration(calibration_config)
        for target_id in (TargetId(module, target) for module, targets in given.items() for target in targets):
            if target_id not in self.quantizers:
                message, near = f"{type(self).__name__} has no such target", nearest(str(target_id), map(str, settings))
                raise CompressionError(message, where=str(target_id), remedy=near)
        ours = {key.module for key in self.quantizers}
        for module in given.keys() - ours:
            message, remedy = f"{type(self).__name__} quantizes no such module", nearest(module, ours)
            raise CompressionError(message, where=f"calibration[{module!r}]", remedy=remedy)
        judged = canonical_calibration(given, NUMBERS, settings)
        entries = {TargetId(module, target): each for module, by in judged.items() for target, each in by.items()}
        shapes = {target_id: self._fitting_shape(target_id, values["scale"]) for target_id, values in entries.items()}
        for target_id, values in entries.items():
            self.take_over(target_id, {name: _with_shape(values[name], shapes[target_id]) for name in NUMBERS})

    def take_over(self, target_id: TargetId, numbers: Mapping[str, Tensor]) -> None:
        """Takes over a target's stored range, scale and zero point, found right and of one shape."""
        quantizer = self.quantizers[target_id]
        quantizer.set_range(numbers["tracked_min"], numbers["tracked_max"])
        for name in ("scale", "zero_point"):
            set_buffer_(quantizer, name, numbers[name])
        quantizer.active = True

    def _fitting_shape(self, target_id: TargetId, scale: Tensor) -> tuple[int, ...]:
        """The shape that a target's scale has, where that of a stored one means the same."""
        layout, given = self.layouts[target_id], tuple(scale.shape)
        axis, shape = scale_layout(_settings(self.selected[target_id]).granularity, layout)
        if axis is not None and layout.shape is None:
            if varies_along(scale, axis) and layout.rank in (None, scale.dim()):
                return given
            remedy = f"should have a scale for each entry of dimension {axis}, and the size 1 in the others"
        else:
            if given == shape or scale.numel() == prod(shape) == 1:
                return shape
            remedy = f"should be {shape}"
        message = f"the calibration's scale has the shape {given}"
        raise CompressionError(message, where=str(target_id), remedy=remedy)

    def result(self) -> tuple[nn.Module, Calibration]:
        """The model and its calibration config."""
        return self.model, self.get_calibration_config()

    def _weight_target(self, host: str) -> Target | None:
        return self.chain.space.targets.get(TargetId(host, "weight"))

    def _quantized_twice(self) -> list[Problem]:
        taken = self.chain.space.targets
        twice = [item for key, item in self.selected.items() if key in taken and taken[key].quantizer is not None]
        remedy = "exclude it from one of the two config lists"
        return [
            Problem(item.where, f"{item.target_id} is quantized by {taken[item.target_id].quantized_by}", remedy)
            for item in twice
        ]

    def _fused_twice(self) -> list[Problem]:
        # An activation has no state: it may stand behind several hosts, called once for each.
        activations = {name for name, module in self.model.named_modules() if is_activation(module)}
        first = {name: type(c).__name__ for c in self.chain.members for names in c.folds() for name in names}
        problems = []
        for index, names in self._fuse_names():
            where = f"config_list[{index}].fuse_names"
            twice = [name for name in names if name in first and name not in activations]
            problems += [Problem(where, f"{name} is fused already by {first[name]}") for name in twice]
            first |= dict.fromkeys(names, where)
        return problems

    def _fuse_names(self) -> list[tuple[int, tuple[str, ...]]]:
        entries = enumerate(self.selection.entries)
        return [
            (index, tuple(names))
            for index, entry in entries
            if isinstance(entry, QuantizeEntry)
            for names in entry.fuse_names
        ]


def _settings(selected: Selected) -> QuantizeTarget:
    assert isinstance(selected.settings, QuantizeTarget)
    return selected.settings


def _with_shape(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    return numbers.reshape(shape) if numbers.numel() == prod(shape) else numbers.reshape(()).expand(shape)


def _calibration(quantizers: Mapping[TargetId, FakeQuantize]) -> Calibration:
    calibration: Calibration = {}
    for target_id, quantizer in quantizers.items():
        if quantizer.settings.apply_method != "bypass":
            calibration.setdefault(target_id.module, {})[target_id.target] = quantizer.calibration()
    return calibration
