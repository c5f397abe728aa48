"""The simulated model: a copy in which masked parameters are zero and masked inputs and outputs are multiplied."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.errors import SpeedupError

Masks = Mapping[str, Mapping[str, Tensor]]
"""Masks by module name and target: 1 = keep, in the target's full shape, 0 = masked."""

_PREFIX = "raycomp_mask"


@dataclass(frozen=True)
class ValueMask:
    """A mask that stays on a module's input or output, as a buffer of the module."""

    module: str
    target: str
    shape: tuple[int, ...]


def masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """A deep copy with the masks applied.

    Args:
        model: a model without compressors on it.
        masks: masks of parameters, inputs (`_input_0`, `_input_name`) and outputs (`_output_0`, `_output_name`).

    Raises:
        SpeedupError: a mask names what the model lacks, or has another shape.
    """
    result = copy.deepcopy(model)
    modules = dict(result.named_modules(remove_duplicate=False))
    for name, targets in masks.items():
        if name not in modules:
            raise SpeedupError(f"masks name a module that the model lacks: {name!r}", where="masks")
        for target, mask in targets.items():
            target = canonical_target(target)
            if target.startswith(("_input_", "_output_")):
                add_value_mask(modules[name], target, mask)
            else:
                _mask_parameter(modules[name], name, target, mask)
    return result


def canonical_target(target: str) -> str:
    """`_input_` and `_output_` are short for index 0."""
    return f"{target}0" if target in ("_input_", "_output_") else target


def _mask_parameter(module: nn.Module, name: str, target: str, mask: Tensor) -> None:
    parameter = getattr(module, target, None)
    if not isinstance(parameter, Tensor):
        raise SpeedupError(f"masks name a parameter that the module lacks: {target!r}", where=name)
    if parameter.shape != mask.shape:
        shapes = f"{tuple(mask.shape)}, and the parameter {tuple(parameter.shape)}"
        raise SpeedupError(f"the mask of {target!r} has the shape {shapes}", where=name)
    with torch.no_grad():
        parameter.mul_((mask != 0).to(parameter))


def buffer_name(target: str) -> str:
    """The name of the buffer that holds the mask of an input or output."""
    return _PREFIX + target


def add_value_mask(module: nn.Module, target: str, mask: Tensor) -> None:
    """Multiplies an input or output of a module with a mask, which becomes a buffer of the module."""
    like = next((p for p in module.parameters() if p.is_floating_point()), mask)
    module.register_buffer(buffer_name(target), mask.to(device=like.device, dtype=like.dtype))
    if target.startswith("_input_"):
        module.register_forward_pre_hook(partial(_mask_input, target), with_kwargs=True)
    else:
        module.register_forward_hook(partial(_mask_output, target))


def restore_value_mask(module: nn.Module, value_mask: ValueMask) -> None:
    """Puts a mask of ones where a plan says that one stays; its values come with the state."""
    add_value_mask(module, value_mask.target, torch.ones(value_mask.shape))


def remove_value_mask(module: nn.Module, target: str) -> None:
    """Takes a mask off an input or output."""
    delattr(module, buffer_name(target))
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, partial) and hook.func in (_mask_input, _mask_output) and hook.args == (target,):
                del hooks[key]


def value_masks(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """The masks on inputs and outputs, by module name and target."""
    return {
        (name, buffer.removeprefix(_PREFIX)): mask
        for name, module in model.named_modules()
        for buffer, mask in module.named_buffers(recurse=False)
        if buffer.startswith(_PREFIX)
    }


def _mask_input(target: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mask = getattr(module, buffer_name(target))
    key = target.removeprefix("_input_")
    names = list(inspect.signature(module.forward).parameters)
    index = int(key) if key.isdigit() else names.index(key)
    if index < len(args):
        return (*args[:index], args[index] * mask, *args[index + 1 :]), kwargs
    name = names[index] if key.isdigit() else key
    return args, {**kwargs, name: kwargs[name] * mask}


def _mask_output(target: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    mask = getattr(module, buffer_name(target))
    key = target.removeprefix("_output_")
    if isinstance(output, Tensor):
        return output * mask
    if isinstance(output, Mapping):
        name = list(output)[int(key)] if key.isdigit() else key
        masked = copy.copy(output)
        masked[name] = output[name] * mask  # type: ignore[index]
        return masked
    items = list(output)
    items[int(key)] = items[int(key)] * mask
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
