"""Folding of batch norms and activations into the layer that hosts them, as the quantizer simulates it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from raycomp.core.attach import TargetSpace
from raycomp.core.folding import fold_calls
from raycomp.errors import SpeedupError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_(space: TargetSpace, folds: Sequence[Sequence[str]]) -> None:
    """Fold in place: each tuple's first module takes over the work of the others, which pass on what it gives.

    A batch norm behind a convolution or linear layer goes into its weight and bias, with the running statistics; any
    other module behind the host is applied to the host's output (before the output is quantized).

    Raises:
        SpeedupError: an unknown module, a batch norm without running statistics, or a host that cannot hold it.
    """
    for fold in folds:
        host = _module(space, fold[0])
        for name in fold[1:]:
            folded = _module(space, name)
            if isinstance(folded, _BATCH_NORMS):
                _fold_batch_norm_(host, folded, f"{fold[0]} and {name}")
            else:
                host.register_forward_hook(_then(folded))
        fold_calls(space, fold)


def _module(space: TargetSpace, name: str) -> nn.Module:
    try:
        return space.module(name)
    except AttributeError:
        raise SpeedupError(f"the model has no module {name!r}", remedy="the folds belong to another model") from None


def _then(module: nn.Module) -> Any:
    return lambda _host, _args, output: module.alone(output)  # type: ignore[operator]


@torch.no_grad()
def _fold_batch_norm_(host: nn.Module, norm: nn.Module, where: str) -> None:
    assert isinstance(norm, _BATCH_NORMS)
    if norm.running_mean is None or norm.running_var is None:
        raise SpeedupError("a batch norm without running statistics cannot be folded", where=where)
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    statistics = (norm.running_mean, norm.running_var, norm.eps, scale, shift)
    if isinstance(host, _CONVOLUTIONS):
        weight, bias = fuse_conv_bn_weights(host.weight, host.bias, *statistics)
    elif isinstance(host, nn.Linear):
        weight, bias = fuse_linear_bn_weights(host.weight, host.bias, *statistics)
    else:
        raise SpeedupError(
            f"a {type(host).__name__} cannot host a batch norm",
            where=where,
            remedy="convolutions and linear layers can",
        )
    host.weight = nn.Parameter(weight.detach(), requires_grad=False)
    host.bias = nn.Parameter(bias.detach(), requires_grad=False)
