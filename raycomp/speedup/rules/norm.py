"""Normalisations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.rules.base import RULES, Kept, NewAttribute, Rule, Sizes, tensor_argument

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")


def _by_channel(tensor: Tensor, ndim: int) -> Tensor:
    return tensor.reshape([1, -1] + [1] * (ndim - 2))


def _scaled(normalised: Tensor, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> Tensor:
    """The influence of weight and bias on a normalised value with channels in dimension 1."""
    for name in ("weight", "bias"):
        parameter = tensor_argument(call, name)
        if parameter is None:
            continue
        if name == "weight":
            normalised = normalised * _by_channel(flow.live(parameter), normalised.ndim)
        normalised = normalised + _by_channel(given[parameter], normalised.ndim)
    return normalised


class ChannelNorm(Rule):
    """Batch and instance norm: each channel by itself.

    Args:
        batch_statistics: whether statistics are those of the present input; None: as the call says.
    """

    def __init__(self, batch_statistics: bool | None = None) -> None:
        self._batch_statistics = batch_statistics

    def _over_positions(self, call: Call) -> bool:
        return bool(call.arguments["training"]) if self._batch_statistics is None else self._batch_statistics

    def relate(self, call: Call, atoms: Atoms) -> None:
        value = call.inputs[0]
        for dim in range(value.ndim):
            atoms.same(value, dim, call.output, dim)
            if dim >= 2 and self._over_positions(call):
                atoms.fix_dim(value, dim, f"{call.label} takes its statistics over it")
        for name in _PER_CHANNEL:
            parameter = tensor_argument(call, name)
            if parameter is not None:
                atoms.same(value, 1, parameter, 0)
        for statistic in call.outputs[1:]:
            if statistic.shape == (value.shape[1],):
                atoms.same(value, 1, statistic, 0)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        value = call.inputs[0]
        taint = given[value]
        if self._over_positions(call):
            others = [dim for dim in range(value.ndim) if dim != 1]
            taint = taint + taint.mean(dim=others, keepdim=True)
        result = _scaled(taint, call, given, flow)
        return [result, *(torch.zeros(extra.shape) + taint.mean() for extra in call.outputs[1:])]

    def attributes(self, call: Call, sizes: Sizes) -> Iterator[NewAttribute]:
        value = call.inputs[0]
        yield NewAttribute(call.owner, "num_features", value.shape[1], sizes(value, 1))


class GroupNorm(Rule):
    """Statistics over all channels of a group: a group goes whole or not at all."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        value, groups = call.arguments["input"], call.arguments["num_groups"]
        for dim in range(value.ndim):
            if dim >= 2:
                atoms.fix_dim(value, dim, f"{call.label} takes its statistics over it")
            atoms.same(value, dim, call.output, dim)
        for name in ("weight", "bias"):
            parameter = tensor_argument(call, name)
            if parameter is not None:
                atoms.same(value, 1, parameter, 0)
        ids = atoms.ids(value, 1).reshape(groups, -1)
        atoms.unite(ids.ravel(), np.repeat(ids[:, 0], ids.shape[1]))

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        value, groups = call.arguments["input"], call.arguments["num_groups"]
        grouped = given[value].reshape(value.shape[0], groups, -1).mean(dim=2)
        spread = grouped.repeat_interleave(value.shape[1] // groups, dim=1)
        spread = spread.reshape([*value.shape[:2]] + [1] * (value.ndim - 2)).expand(value.shape)
        return [_scaled(spread, call, given, flow)]

    def attributes(self, call: Call, sizes: Sizes) -> Iterator[NewAttribute]:
        value, groups = call.arguments["input"], call.arguments["num_groups"]
        channels = value.shape[1]
        yield NewAttribute(call.owner, "num_channels", channels, sizes(value, 1))
        yield NewAttribute(call.owner, "num_groups", groups, sizes(value, 1) * groups // channels)

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        value, groups = call.arguments["input"], call.arguments["num_groups"]
        return {"num_groups": kept.size(value, 1) * groups // value.shape[1]}


class LayerNorm(Rule):
    """Statistics over the last dimensions: nothing of them can go, for their number enters the mean."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        value = call.arguments["input"]
        normalised = len(call.arguments["normalized_shape"])
        for dim in range(value.ndim):
            if dim >= value.ndim - normalised:
                atoms.fix_dim(value, dim, f"{call.label} normalises over it")
            atoms.same(value, dim, call.output, dim)
        for name in ("weight", "bias"):
            parameter = tensor_argument(call, name)
            if parameter is not None:
                atoms.fix_value(parameter, f"{call.label} normalises over it")

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        value = call.arguments["input"]
        dims = list(range(value.ndim - len(call.arguments["normalized_shape"]), value.ndim))
        total = given[value].mean(dim=dims, keepdim=True).expand(value.shape)
        weight, bias = tensor_argument(call, "weight"), tensor_argument(call, "bias")
        if weight is not None:
            total = total * flow.live(weight) + given[weight]
        return [total + given[bias] if bias is not None else total]


RULES.register(ChannelNorm(), "aten.batch_norm")
RULES.register(ChannelNorm(batch_statistics=False), "aten._native_batch_norm_legit_no_training")
RULES.register(
    ChannelNorm(batch_statistics=True),
    "aten.instance_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_functional",
)
RULES.register(GroupNorm(), "aten.group_norm")
RULES.register(LayerNorm(), "aten.layer_norm", "aten.rms_norm")
