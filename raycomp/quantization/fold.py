"""Modules that compute as one operator: Conv/Linear + BatchNorm (+ ReLU), Conv/Linear + ReLU, BatchNorm + ReLU.

The first hosts the rest, which pass on what it gives. In training a folded batch norm still uses and updates its own
statistics; in evaluation the host computes exactly what the folded integer layer will.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.core.attach import TargetSpace
from raycomp.core.folding import Hosting, fold_calls
from raycomp.core.selection import type_name
from raycomp.core.target import Target
from raycomp.errors import CompressionError, Problem

_HOSTS = ("Conv1d", "Conv2d", "Conv3d", "Linear")
_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
_ACTIVATIONS = ("ReLU", "ReLU6", "Hardtanh")


class _Host(Hosting):
    # In a tuple, because a module in an attribute would become a child and stand twice in the state dict.
    raycomp_fold: tuple[Target | None, nn.Module | None, nn.Module | None]
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # torch's name, by which it may be called
        self.check_call()
        weight_target, norm, activation = self.raycomp_fold
        if norm is None:
            value = super().forward(input)  # type: ignore[misc]
        else:
            value = self._with_norm(input, weight_target, norm)
        return value if activation is None else activation.alone(value)  # type: ignore[operator, no-any-return]

    def _with_norm(self, value: Tensor, weight_target: Target | None, norm: nn.Module) -> Tensor:
        if type_name(self) == "Linear" and value.dim() != 2:
            message = f"a linear layer whose input has the shape {tuple(value.shape)} has no channels in dimension 1"
            raise CompressionError(message, remedy="fuse a batch norm with linear layers of [samples, features] alone")
        factor = fold_factor(norm)
        if norm.training:
            # The output is divided by the factor again, so no gradient belongs to it; and a channel whose gamma is 0
            # must not divide by it: any factor serves, because the norm multiplies by 0.
            factor = torch.where(factor == 0, torch.ones_like(factor), factor).detach()
        weight = self.weight * _along_first(factor, self.weight)
        if weight_target is not None and weight_target.quantizer is not None:
            weight = weight_target.quantizer(weight)
        if not norm.training:
            mean: Tensor = norm.running_mean  # type: ignore[assignment]
            beta: Tensor | None = norm.bias  # type: ignore[assignment]
            bias = -mean if self.bias is None else self.bias - mean
            shift = bias * factor if beta is None else bias * factor + beta
            return _linear_part(self, value, weight, shift.to(weight.dtype))
        output = _linear_part(self, value, weight, None)
        output = output / _along_channel(factor, output)
        if self.bias is not None:
            output = output + _along_channel(self.bias, output)
        return norm.alone(output)  # type: ignore[operator, no-any-return]


def fold_factor(norm: nn.Module) -> Tensor:
    """γ/σ of a batch norm in evaluation form: what the folded weight is multiplied by, one per channel."""
    spread = torch.rsqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    return spread if norm.weight is None else norm.weight * spread  # type: ignore[operator]


def folded_weight(host: nn.Module) -> Tensor:
    """The masked weight as it is quantized: times γ/σ where the host folds a norm."""
    weight: Tensor = host.weight  # type: ignore[assignment]
    fold = getattr(host, "raycomp_fold", None)
    if fold is None or fold[1] is None:
        return weight.detach()
    return weight.detach() * _along_first(fold_factor(fold[1]).detach(), weight)


def fold(space: TargetSpace, names: tuple[str, ...], weight_target: Target | None) -> None:
    """Makes the first named module host the others, until the space is detached."""
    modules = [space.module(name) for name in names]
    host, rest = modules[0], modules[1:]
    norms = [module for module in rest if type_name(module) in _NORMS]
    activations = [module for module in rest if type_name(module) in _ACTIVATIONS]
    fold_calls(space, names, _Host)
    norm = norms[0] if norms else None
    if norm is not None and weight_target is not None:
        weight_target.defer_quantizer = True
    host.__dict__["raycomp_fold"] = (weight_target, norm, activations[0] if activations else None)
    space.on_detach(lambda: delattr(host, "raycomp_fold"))


def is_activation(module: nn.Module) -> bool:
    """Whether a module can be the last of what is folded, and has no state of its own."""
    return type_name(module) in _ACTIVATIONS


def fold_problem(model: nn.Module, names: tuple[str, ...], where: str) -> Problem | None:
    """What is wrong with one `fuse_names` tuple, if anything is."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            return Problem(where, f"the model has no module {name!r}")
    modules = [known[name] for name in names]
    kinds = [type_name(module) for module in modules]
    patterns = ((_HOSTS, _NORMS), (_HOSTS, _NORMS, _ACTIVATIONS), (_HOSTS, _ACTIVATIONS), (_NORMS, _ACTIVATIONS))
    fits = any(
        len(kinds) == len(pattern) and all(kind in group for kind, group in zip(kinds, pattern, strict=True))
        for pattern in patterns
    )
    if not fits:
        remedy = "Conv/Linear + BatchNorm (+ ReLU), Conv/Linear + ReLU, or BatchNorm + ReLU, in this order"
        return Problem(where, f"{' + '.join(kinds)} can't be fused", remedy)
    if kinds[0] in _HOSTS and kinds[1] in _NORMS:
        channels = modules[0].weight.shape[0]  # type: ignore[union-attr, index]
        if modules[1].num_features != channels:
            return Problem(where, f"{names[1]} has {modules[1].num_features} channels, {names[0]} gives {channels}")
        if modules[1].running_mean is None:
            return Problem(where, f"{names[1]} keeps no running statistics, so it can't be folded")
    return None


def _linear_part(host: nn.Module, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if type_name(host) == "Linear":
        return functional.linear(value, weight, bias)
    return host._conv_forward(value, weight, bias)  # type: ignore[operator]


def _along_first(vector: Tensor, value: Tensor) -> Tensor:
    return vector.view(-1, *([1] * (value.dim() - 1)))


def _along_channel(vector: Tensor, value: Tensor) -> Tensor:
    return vector.view(-1, *([1] * (value.dim() - 2)))
