"""A copy of a model without the compressors that stand on it."""

from __future__ import annotations

import copy
from types import MethodType

from torch import nn
from torch.nn.utils import parametrize

from raycomp.core.attach import HookedTargets
from raycomp.core.target import Target


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the user's model with its dense weights: no masks, no fake quantization, no folded norms."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        while type(module).__dict__.get("raycomp_swapped"):
            module.__class__ = type(module).__bases__[1]
        module.__dict__.pop("raycomp_fold", None)
        _remove_parametrizations(module)
        while type(module).__dict__.get("raycomp_swapped"):
            module.__class__ = type(module).__bases__[1]
        _remove_hooks(module)
    return plain


def _remove_parametrizations(module: nn.Module) -> None:
    # Not torch's remove_parametrizations: it deletes the property from a class that the original model shares.
    if not parametrize.is_parametrized(module):
        return
    chains: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    for name, chain in list(chains.items()):
        if isinstance(chain, parametrize.ParametrizationList) and all(isinstance(each, Target) for each in chain):
            del chains[name]
            module._parameters[name] = chain.original  # type: ignore[assignment]
    if len(chains) == 0:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, MethodType) and isinstance(hook.__self__, HookedTargets):
                del hooks[key]
    for name, child in list(module.named_children()):
        if isinstance(child, HookedTargets):
            delattr(module, name)
