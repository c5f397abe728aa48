"""Batch norm over the global batch, on any device and backend.

torch's SyncBatchNorm refuses CPU tensors and weighs a stand-in batch like a real one; this one gives what a single
process computes on the whole batch: output, gradients and running statistics (Ioffe and Szegedy, 1502.03167).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from raycomp.core.batch_share import current_share, is_idle
from raycomp.core.reduction import communication_device, is_distributed, sum_over_ranks_, world_size
from raycomp.errors import CompressionError


def synchronise_batch_norm_(model: nn.Module) -> list[str]:
    """Lets every batch norm of `model` train on the moments of the global batch.

    Comes before compressors are attached. A norm's class becomes a subclass of the same name; its parameters, buffers
    and hooks stay. In evaluation, and without a process group, it
    computes what it always did. While a norm trains, each of its forward and backward passes is a collective.

    Returns:
        The names of the norms.

    Raises:
        CompressionError: a norm has a forward of its own, or is parametrized already.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and not is_synchronised(module)
    }
    for name, norm in norms.items():
        if type(norm).forward is not _BatchNorm.forward or is_parametrized(norm):
            raise CompressionError(
                f"this {type(norm).__name__} has a forward of its own or a parametrization: it can't be synchronised",
                where=name,
                remedy="synchronise before compressors are attached, or leave sync_batch_norm out",
            )
    for norm in norms.values():
        norm.__class__ = _synchronised_class(type(norm))  # type: ignore[arg-type]  # mypy: a module class has no hash
    return list(norms)


def is_synchronised(module: nn.Module) -> bool:
    """Whether `module` is a batch norm that trains on the moments of the global batch."""
    return isinstance(module, _Synchronised)


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Moments of each channel over the global batch.

    Args:
        mean: of shape [channels].
        variance: biased, of shape [channels].
        count: values per channel, of shape [].
    """

    mean: Tensor
    variance: Tensor
    count: Tensor


@torch.no_grad()
def global_moments(input: Tensor) -> ChannelMoments:
    """The moments of `input` [batch, channels, ...] over the batches of all ranks; bitwise the same on each of them.

    Each rank's moments are merged as Chan, Golub and LeVeque (1979) merge them, in float64, so that a mean far from
    zero costs no digits. A rank without samples (`BatchShare.samples == 0`) counts nothing. A collective.
    """
    exact = input if input.dtype == torch.float64 else input.float()
    mean, variance = _own_moments(exact)
    count = 0 if is_idle() else input.numel() // input.shape[1]
    counts = torch.full_like(mean, count)[:1]
    mine = torch.cat([counts, mean, variance]).double() * (count > 0)
    ranks = _gathered(mine)
    counts, means, variances = ranks[:, :1], ranks[:, 1 : 1 + len(mean)], ranks[:, 1 + len(mean) :]
    total = counts.sum()
    merged = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - merged) ** 2)).sum(0) / total
    return ChannelMoments(merged.to(mean), spread.to(mean), total.to(mean))


def _gathered(mine: Tensor) -> Tensor:
    """[ranks, values] of every rank's `mine` [values]."""
    if not is_distributed():
        return mine[None]
    sent = mine.to(communication_device(mine.device))
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent)
    return torch.stack(received).to(mine.device)


def _own_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in two passes: on a CPU much faster than `torch.var_mean`."""
    dims = [dim for dim in range(input.ndim) if dim != 1]
    mean = input.mean(dims, keepdim=True)
    centred = input - mean
    # The mean was rounded; what is left of it in the centred values corrects the variance.
    rest = centred.mean(dims)
    return mean.flatten() + rest, centred.square_().mean(dims) - rest.square()


class _Synchronised(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and is_distributed()):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        share = current_share()
        samples = share.total if share is not None else world_size() * input.shape[0]
        if samples * input[0, 0].numel() <= 1:
            found = list(input.shape)
            raise ValueError(f"batch norm needs more than one value per channel to train on, got input {found}")
        moments = global_moments(input)
        _update_running_(self, moments)
        return _Normalise.apply(input, self.weight, self.bias, moments, self.eps)  # type: ignore[no-untyped-call]


@cache
def _synchronised_class(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(kind.__name__, (_Synchronised, kind), {"__module__": kind.__module__})


@torch.no_grad()
def _update_running_(norm: _BatchNorm, moments: ChannelMoments) -> None:
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    factor = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    unbiased = moments.variance * (moments.count / (moments.count - 1))
    norm.running_mean.lerp_(moments.mean.to(norm.running_mean), factor)
    norm.running_var.lerp_(unbiased.to(norm.running_var), factor)


class _Normalise(torch.autograd.Function):
    """Normalises by moments that themselves depend on the input of every rank."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, moments: ChannelMoments, eps: float
    ) -> Tensor:
        ctx.save_for_backward(input, weight, moments.mean, moments.variance, moments.count)
        ctx.eps = eps
        ctx.idle = is_idle()
        return F.batch_norm(input, moments.mean, moments.variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # The gradient where the moments are held fixed; its sums are what the moments' own gradient needs.
        grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, input, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = torch.stack([grad_weight, grad_bias]).double() * (not ctx.idle)
            sum_over_ranks_(sums)
            if not ctx.idle:
                inverse_deviation = (variance + ctx.eps).rsqrt()
                by_weight, by_bias = (-scale * inverse_deviation * sums / count).to(mean)
                grad_input += F.batch_norm(input, mean, variance, by_weight, by_bias, training=False, eps=ctx.eps)
        return (
            grad_input if ctx.needs_input_grad[0] else None,
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
        )
