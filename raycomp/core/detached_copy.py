"""A copy of a model without the compressors that stand on it."""

from __future__ import annotations

import copy
from types import MethodType

from torch import nn
from torch.nn.utils import parametrize

from raycomp.core.attach import HookedTargets, remove_parametrization
from raycomp.core.target import Target


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the user's model with its dense weights: no masks, no fake quantization, no folded norms."""
    detached = copy.deepcopy(model)
    for module in list(detached.modules()):
        _restore_class(module)
        for name in [name for name in module.__dict__ if name.startswith("raycomp_")]:
            del module.__dict__[name]
        _remove_parametrizations(module)
        _restore_class(module)
        _remove_hooks(module)
    return detached


def _restore_class(module: nn.Module) -> None:
    while type(module).__dict__.get("raycomp_swapped"):
        module.__class__ = type(module).__bases__[1]


def _remove_parametrizations(module: nn.Module) -> None:
    if not parametrize.is_parametrized(module):
        return
    chains: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    for name, chain in list(chains.items()):
        if isinstance(chain, parametrize.ParametrizationList) and all(isinstance(each, Target) for each in chain):
            remove_parametrization(module, name)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, MethodType) and isinstance(hook.__self__, HookedTargets):
                del hooks[key]
    for name, child in list(module.named_children()):
        if isinstance(child, HookedTargets):
            delattr(module, name)
