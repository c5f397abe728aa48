"""The base of pruners: masks on targets, and the decisions of a schedule."""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycomp.config import Align, PruneTarget, nearest
from raycomp.core.chain import Chain, Masks
from raycomp.core.compressor import Compressor, ConfigList
from raycomp.core.selection import Kind, Selected, type_name
from raycomp.core.target import AdoptsShapes, TargetId, set_buffer_, target_kind
from raycomp.errors import CompressionError, ConfigError, Problem
from raycomp.evaluators.plain import TorchEvaluator
from raycomp.pruning.masks import MaskRequest, make_masks
from raycomp.pruning.saliency import block_elements, block_sizes, expand_blocks, follow
from raycomp.pruning.schedule import Decision, Schedule, once

_CONVOLUTION = re.compile(r"(?:Conv|ConvTranspose)([123])d")
_SOFTMAX_ZERO = -1000.0
"""What `add` adds where masked: exp of it is 0 (NNI's value)."""


class Mask(AdoptsShapes):
    """Applies a mask to its target: `mul` zeroes, `add` adds -1000 where masked (for the inputs of a softmax).

    Args:
        shape: the target's shape; () for an activation, whose mask has none before the first decision.
        method: mul, add or bypass.
        channels_last: whether an activation's channels are its last dimension, and not dimension 1.
    """

    mask: Tensor

    def __init__(self, shape: tuple[int, ...], method: str, *, channels_last: bool = False) -> None:
        super().__init__()
        self.method = method
        self.channels_last = channels_last
        self.register_buffer("mask", torch.ones(shape))

    def forward(self, value: Tensor) -> Tensor:
        """The masked value."""
        if 0 < self.mask.dim() < value.dim() and not self.channels_last:
            # [1, channels] of an activation whose rank wasn't known: behind the channels all is kept or masked alike.
            self.mask = self.mask.reshape(*self.mask.shape, *[1] * (value.dim() - self.mask.dim()))
        if self.method == "mul":
            return value * self.mask.to(value.dtype)
        if self.method == "add":
            return value + (1 - self.mask.to(value.dtype)) * _SOFTMAX_ZERO
        return value


class Pruner(Compressor):
    """A pruner decides its masks at the steps of a schedule, from saliencies that a subclass gives.

    A mask never grows back: blocks that one decision pruned stay pruned in the next.

    Args:
        model: the model, or a chain to fuse with.
        config_list: see `Compressor`; keys are those of `PruneEntry`.
        evaluator: how to train, where the algorithm needs it.
    """

    kind: ClassVar[Kind] = "pruner"

    def __init__(
        self, model: nn.Module | Chain, config_list: ConfigList, evaluator: TorchEvaluator | None = None
    ) -> None:
        self.schedule: Schedule = once(self.window)
        self.masks: dict[TargetId, Mask] = {}
        super().__init__(model, config_list, evaluator)

    @property
    def needs_training(self) -> bool:
        return self.schedule[-1].step > 0

    def steps_to_go(self) -> int | None:
        return max(self.schedule[-1].step - self.chain.step, 0) or None

    @property
    def window(self) -> int:
        """How many steps before a decision its statistics are collected."""
        return 0

    @abstractmethod
    def saliencies(self) -> dict[TargetId, Tensor]:
        """The saliency of every block of every target that has a goal of its own, from merged statistics."""

    @property
    def goals(self) -> dict[TargetId, Selected]:
        """The targets that have a goal of their own; the others follow by align."""
        return {key: item for key, item in self.selected.items() if self.alignment(key) is None}

    def alignment(self, target_id: TargetId) -> Align | None:
        """What the target's mask follows: its `align`, for a bias by default the weight of the same module."""
        settings = self._settings(target_id)
        if settings.align is not None:
            return settings.align
        own = {"sparse_ratio", "sparse_threshold"} & self.selected[target_id].own_keys
        weight = TargetId(target_id.module, "weight")
        return Align() if target_id.target == "bias" and weight in self.selected and not own else None

    def blocks(self, target_id: TargetId) -> tuple[int, ...]:
        """The block sizes of a target's granularity."""
        return block_sizes(self._granularity(target_id), self.shape(target_id))

    def shape(self, target_id: TargetId) -> tuple[int, ...]:
        """The target's shape; of an activation it is known once statistics are there."""
        return tuple(self.chain.space.parameter(target_id).shape)

    def check(self) -> None:
        """Refuses goals for activations, blocks that don't fit, and align cycles."""
        problems = []
        for target_id, selected in self.selected.items():
            if self.alignment(target_id) is not None:
                continue
            if target_kind(target_id.target) == "parameter":
                problems += self._block_problems(target_id, selected)
            else:
                message = f"{target_id}: {type(self).__name__} can't rank inputs or outputs"
                problems.append(Problem(selected.where, message, "align it to a parameter of a module"))
        problems += self._align_problems()
        if problems:
            raise ConfigError(problems)

    def attach(self) -> None:
        for target_id, selected in self.selected.items():
            parameter = target_kind(target_id.target) == "parameter"
            shape = self.shape(target_id) if parameter else ()
            last = type_name(self.chain.space.module(target_id.module)) == "Linear"
            fresh = Mask(shape, self._settings(target_id).apply_method, channels_last=last)
            mask = self.masks.setdefault(target_id, fresh)
            device = next(self.model.parameters()).device
            self.chain.space.target(target_id).claim("mask", mask.to(device), f"{type(self).__name__} {selected.where}")

    def is_due(self, step: int) -> bool:
        return self._decision(step) is not None or any(leader.is_due(step) for leader in self._leaders())

    def decide(self, step: int) -> None:
        """Makes and sets the masks that are due at `step`, and lets followers follow.

        Raises:
            ConfigError: members of a group don't fit each other.
            CompressionError: a saliency is not a finite number.
        """
        decision = self._decision(step)
        if decision is not None:
            self._set_masks(decision)
        self._align()

    def finish(self) -> None:
        last = self.schedule[-1].step
        if self.chain.step < last and self.goals:
            message = f"the training ended after step {self.chain.step}, the last masks are due after step {last}"
            warnings.warn(f"{type(self).__name__}: {message}: the goal is not reached", stacklevel=2)

    def _decision(self, step: int) -> Decision | None:
        return next((decision for decision in self.schedule if decision.step == step), None)

    def _leaders(self) -> list[Compressor]:
        """The compressors fused before this one whose masks its own follow."""
        sources = [self._source(key, align) for key in self.selected if (align := self.alignment(key)) is not None]
        earlier = self.chain.compressors[: self.chain.compressors.index(self)]
        return [c for c in earlier if isinstance(c, Pruner) and any(source in c.masks for source in sources)]

    def _set_masks(self, decision: Decision) -> None:
        saliencies = self.saliencies()
        for target_id, saliency in saliencies.items():
            if not bool(torch.isfinite(saliency).all()):
                message = "the saliency is not finite: the training has diverged"
                raise CompressionError(message, where=str(target_id), remedy="lower the learning rate")
        requests = [self._request(target_id, saliency, decision) for target_id, saliency in saliencies.items()]
        try:
            made = make_masks(requests)
        except ValueError as error:
            raise ConfigError([Problem("config_list", str(error))]) from None
        for target_id in saliencies:
            keep = expand_blocks(made[target_id].to(torch.float32), self.blocks(target_id))
            set_buffer_(self.masks[target_id], "mask", keep)

    def commit(self) -> None:
        """Zeroes the masked elements of the parameters for good."""
        with torch.no_grad():
            for target_id, mask in self.masks.items():
                if target_kind(target_id.target) == "parameter" and mask.method == "mul":
                    parameter = self.chain.space.parameter(target_id)
                    parameter.mul_(mask.mask.to(parameter))

    def get_masks(self) -> Masks:
        """{module: {target: mask}}; 1 = keep."""
        masks: Masks = {}
        for target_id, mask in self.masks.items():
            masks.setdefault(target_id.module, {})[target_id.target] = mask.mask.detach().clone()
        return masks

    def update_masks(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Sets masks that were stored before.

        Raises:
            CompressionError: a target that this pruner doesn't have, or a mask that doesn't fit its parameter.
        """
        given = {
            TargetId(module, target): mask for module, targets in masks.items() for target, mask in targets.items()
        }
        for target_id, mask in given.items():
            if target_id not in self.masks:
                remedy = nearest(str(target_id), map(str, self.masks))
                raise CompressionError(f"{type(self).__name__} has no such target", where=str(target_id), remedy=remedy)
            if target_kind(target_id.target) == "parameter" and tuple(mask.shape) != self.shape(target_id):
                message = f"the mask's shape is {tuple(mask.shape)}, the parameter's {self.shape(target_id)}"
                raise CompressionError(message, where=str(target_id))
        for target_id, mask in given.items():
            set_buffer_(self.masks[target_id], "mask", mask)

    def result(self) -> tuple[nn.Module, Masks]:
        """The model and its masks."""
        return self.model, self.get_masks()

    def _settings(self, target_id: TargetId) -> PruneTarget:
        settings = self.selected[target_id].settings
        assert isinstance(settings, PruneTarget)
        return settings

    def _granularity(self, target_id: TargetId) -> Any:
        granularity = self._settings(target_id).granularity
        if granularity != "default":
            return granularity
        return "out_channel" if target_kind(target_id.target) == "parameter" else "per_channel"

    def _request(self, target_id: TargetId, saliency: Tensor, decision: Decision) -> MaskRequest:
        blocks = self.blocks(target_id)
        mask = self.masks[target_id].mask
        pruned = mask[tuple(slice(None, None, block) for block in blocks)] == 0 if mask.dim() else None
        settings = self._settings(target_id)
        return MaskRequest(target_id, saliency, block_elements(blocks), settings, decision.fraction, pruned)

    def _align(self) -> None:
        for target_id in self._align_order():
            align = self.alignment(target_id)
            assert align is not None
            source = self._source(target_id, align)
            mask = self._mask_of(source)
            followed = follow(mask, align.dims)
            target = self.masks[target_id]
            parameter = target_kind(target_id.target) == "parameter"
            shape = target.mask.shape if parameter else self._activation_shape(target_id, followed)
            set_buffer_(target, "mask", followed.reshape(shape))

    def _source(self, target_id: TargetId, align: Align) -> TargetId:
        module = target_id.module if align.module_name is None else align.module_name
        return TargetId(module, align.target_name)

    def _mask_of(self, target_id: TargetId) -> Tensor:
        if target_id in self.masks:
            return self.masks[target_id].mask
        return self.chain.masks()[target_id.module][target_id.target]

    def _align_order(self) -> list[TargetId]:
        """The followers, each after what it follows."""
        waiting = [key for key in self.selected if self.alignment(key) is not None]
        order: list[TargetId] = []
        while waiting:
            ready = [key for key in waiting if self._source(key, self.alignment(key) or Align()) not in waiting]
            if not ready:
                break
            order += ready
            waiting = [key for key in waiting if key not in ready]
        return order

    def _align_problems(self) -> list[Problem]:
        problems = []
        earlier = self.chain.masks()
        ordered = self._align_order()
        for target_id, selected in self.selected.items():
            align = self.alignment(target_id)
            if align is None:
                continue
            source = self._source(target_id, align)
            if source not in self.selected and source.target not in earlier.get(source.module, {}):
                remedy = "name a target that this pruner or one fused before it masks"
                problems.append(
                    Problem(f"{selected.where}.align", f"{target_id} follows {source}, which has no mask", remedy)
                )
            elif target_id not in ordered:
                problems.append(Problem(f"{selected.where}.align", f"{target_id} follows itself in a circle"))
            else:
                problems += self._align_shape_problems(target_id, source, align)
        return problems

    def _align_shape_problems(self, target_id: TargetId, source: TargetId, align: Align) -> list[Problem]:
        if "parameter" not in (target_kind(target_id.target), target_kind(source.target)):
            return []
        if target_kind(target_id.target) != "parameter" or target_kind(source.target) != "parameter":
            return []
        theirs, ours = self.shape(source), self.shape(target_id)
        where = f"{self.selected[target_id].where}.align"
        if any(dim >= len(theirs) for dim in align.dims):
            return [Problem(where, f"dims {list(align.dims)} are not dimensions of {source}, of shape {theirs}")]
        count = torch.Size([theirs[dim] for dim in align.dims]).numel()
        if count == torch.Size(ours).numel():
            return []
        return [Problem(where, f"{target_id} of shape {ours} can't follow {count} entries of {source}")]

    def _activation_shape(self, target_id: TargetId, followed: Tensor) -> tuple[int, ...]:
        convolution = _CONVOLUTION.fullmatch(type_name(self.chain.space.module(target_id.module)))
        rank = int(convolution[1]) + 2 if convolution else max(self.masks[target_id].mask.dim(), 2)
        return (1, followed.numel(), *[1] * (rank - 2))

    def _block_problems(self, target_id: TargetId, selected: Selected) -> list[Problem]:
        try:
            self.blocks(target_id)
        except ValueError as error:
            return [Problem(f"{selected.where}.granularity", f"{target_id}: {error}")]
        return []
