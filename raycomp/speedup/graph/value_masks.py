"""The simulated model: a copy whose parameters, inputs and outputs are masked as they were in training."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from raycomp.config import nearest
from raycomp.core.attach import forward_arguments
from raycomp.core.layout import layout_of, traced_shapes
from raycomp.core.masks import ApplyMethod, Masks, apply_mask, fits
from raycomp.core.parts import replace_input, replace_output
from raycomp.core.target import TargetId, target_kind
from raycomp.errors import CompressionError, SpeedupError
from raycomp.speedup.graph.example import Example

_PREFIX = "raycomp_mask"


@dataclass(frozen=True)
class ValueMask:
    """A mask that stays on a module's input or output, as a buffer of the module.

    Raises:
        ValueError: the method isn't one of `ApplyMethod`.
    """

    module: str
    target: str
    shape: tuple[int, ...]
    method: ApplyMethod = "mul"

    def __post_init__(self) -> None:
        if self.method not in get_args(ApplyMethod):
            raise ValueError(f"a mask can't be applied by {self.method!r}")


def fitted_masks(model: nn.Module, masks: Masks, example: Example) -> Masks:
    """The masks, those of inputs and outputs in the rank of what the modules of the model take and give on the example.

    `[channels]` is taken where the channels are last, `[1, channels]` where they are in dimension 1.

    Raises:
        SpeedupError: a mask doesn't fit, or masks what isn't there.
    """
    given = {key: mask for key, mask in masks.by_target() if target_kind(key.target) != "parameter"}
    known = dict(model.named_modules(remove_duplicate=False))
    some = {TargetId(key.module, end) for key in given for end in ("_input_0", "_output_0")}
    try:
        wanted = {key for key in some | given.keys() if key.module in known}
        shapes = traced_shapes(model, wanted, example) if wanted else {}
        layouts = {key: layout_of(model, key, shapes[key]) for key in given if key in shapes}
    except CompressionError as error:
        raise SpeedupError(error.message, where=error.where, remedy=error.remedy) from error
    ran, fitted = {key.module for key in shapes}, Masks(masks)
    for key, mask in given.items():
        if key in shapes:
            fitted[key.module][key.target] = _fitted(key, mask, shapes[key], layouts[key].value_channel_dim)
        elif key.module in ran:
            raise SpeedupError("masks name what the module neither takes nor gives", where=str(key))
    return fitted


def _fitted(key: TargetId, mask: Tensor, shape: tuple[int, ...], channel_dim: int | None) -> Tensor:
    whole = _in_rank(mask, shape, channel_dim)
    if whole is not None and fits(whole, (1, *shape[1:])):
        return whole
    message = f"the mask's shape is {tuple(mask.shape)}, and the value's {shape}"
    remedy = "one mask for all samples, which broadcasts to the value dimension by dimension"
    if len(shape) > 1:
        channels = len(shape) - 1 if channel_dim == -1 else 1
        right = tuple(size if dim == channels else 1 for dim, size in enumerate(shape))
        which = "for its channels" if channel_dim is not None else f"for those of dimension {channels}"
        remedy = f"{remedy}: {right} {which}"
    raise SpeedupError(message, where=str(key), remedy=remedy)


def _in_rank(mask: Tensor, shape: tuple[int, ...], channel_dim: int | None) -> Tensor | None:
    """A mask in the rank of a value; None where its shape doesn't tell which dimensions it is of."""
    ones = [1] * (len(shape) - mask.dim())
    if not mask.dim() or not ones:
        return mask
    # Where the class doesn't tell, one size may be that of the channels and that of the width.
    is_last = channel_dim == -1 or len(shape) == 2 or (channel_dim is None and shape[1] != shape[-1])
    if mask.dim() == 1 and is_last:
        return mask.reshape(*ones, *mask.shape)
    if mask.dim() == 2 and channel_dim != -1:
        return mask.reshape(*mask.shape, *ones)
    return None


def masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """A deep copy with the masks applied, each by its method.

    Args:
        model: a model without compressors on it.
        masks: masks of parameters, inputs (`_input_0`, `_input_name`) and outputs (`_output_0`, `_output_name`).

    Raises:
        SpeedupError: a mask names what the model lacks, or has another shape.
    """
    result = copy.deepcopy(model)
    modules = dict(result.named_modules(remove_duplicate=False))
    for name in masks.keys() - modules.keys():
        message = f"masks name a module that the model lacks: {name!r}"
        raise SpeedupError(message, where="masks", remedy=nearest(name, modules))
    for (name, target), mask in masks.by_target():
        method = masks.method(name, target)
        if target_kind(target) == "parameter":
            _mask_parameter(modules[name], name, target, mask, method)
        elif method != "bypass":
            _mask_value(modules[name], name, target, mask, method)
    return result


def _mask_parameter(module: nn.Module, name: str, target: str, mask: Tensor, method: ApplyMethod) -> None:
    parameter = getattr(module, target, None)
    if not isinstance(parameter, nn.Parameter):
        raise SpeedupError(f"masks name a parameter that the module lacks: {target!r}", where=name)
    if parameter.shape != mask.shape:
        shapes = f"{tuple(mask.shape)}, and the parameter {tuple(parameter.shape)}"
        raise SpeedupError(f"the mask of {target!r} has the shape {shapes}", where=name)
    with torch.no_grad():
        parameter.copy_(apply_mask(parameter, (mask != 0).to(parameter), method))


def _mask_value(module: nn.Module, name: str, target: str, mask: Tensor, method: ApplyMethod) -> None:
    """Masks an input or output; with a mask that an earlier stage left there, both hold."""
    present = value_masks(module).get(TargetId("", target))
    if present is not None:
        if present.method != method:
            message = f"the mask of {target!r} on the model is applied by {present.method!r}, not by {method!r}"
            raise SpeedupError(message, where=name)
        mask = mask.to(present.mask) * present.mask
        remove_value_mask(module, target)
    add_value_mask(module, target, mask, method)


def buffer_name(target: str) -> str:
    """The name of the buffer that holds the mask of an input or output."""
    return _PREFIX + target


def add_value_mask(module: nn.Module, target: str, mask: Tensor, method: ApplyMethod) -> None:
    """Masks an input or output of a module by a mask that becomes a buffer of the module."""
    like = next((p for p in module.parameters() if p.is_floating_point()), mask)
    module.register_buffer(buffer_name(target), mask.to(device=like.device, dtype=like.dtype))
    if target_kind(target) == "input":
        module.register_forward_pre_hook(partial(_mask_input, target, method), with_kwargs=True)
    else:
        module.register_forward_hook(partial(_mask_output, target, method))


def restore_value_mask(module: nn.Module, value_mask: ValueMask) -> None:
    """Puts a mask of ones where a plan says that one stays; its values come with the state."""
    remove_value_mask(module, value_mask.target)
    add_value_mask(module, value_mask.target, torch.ones(value_mask.shape), value_mask.method)


def remove_value_mask(module: nn.Module, target: str) -> None:
    """Takes the mask off an input or output, where there is one."""
    module._buffers.pop(buffer_name(target), None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if _is_mask_of(hook, target):
                del hooks[key]


def _is_mask_of(hook: Any, target: str) -> bool:
    return isinstance(hook, partial) and hook.func in (_mask_input, _mask_output) and hook.args[0] == target


@dataclass(frozen=True)
class PresentMask:
    """A mask on an input or output of a live model, and how it is applied."""

    mask: Tensor
    method: ApplyMethod


def value_masks(model: nn.Module) -> dict[TargetId, PresentMask]:
    """The masks on inputs and outputs of a model's modules."""
    return {
        TargetId(name, hook.args[0]): PresentMask(module.get_buffer(buffer_name(hook.args[0])), hook.args[1])
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if isinstance(hook, partial) and hook.func in (_mask_input, _mask_output)
    }


def new_value_masks(masked: nn.Module, model: nn.Module) -> set[TargetId]:
    """The masks on inputs and outputs that a masked copy of a model got, or that became stricter there."""
    old = value_masks(model)
    return {key for key, new in value_masks(masked).items() if key not in old or not _equal(old[key].mask, new.mask)}


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool((left == right.to(left)).all())


def settle_value_masks(model: nn.Module, new: set[TargetId], old: Collection[TargetId]) -> tuple[ValueMask, ...]:
    """Takes new masks that have nothing left to mask off a masked model, and says which stay.

    Args:
        model: the masked model, cut or not; it is changed in place.
        new: the masks in question.
        old: those that the model had before; they stay.
    """
    # A rewritten forward may read a mask without its module's hook.
    read = {node.target for node in model.graph.nodes} if isinstance(model, fx.GraphModule) else set()
    stay = []
    for target_id, present in value_masks(model).items():
        name, target = target_id
        is_empty = bool((present.mask == 1).all()) and full_name(name, buffer_name(target)) not in read
        if target_id in new and target_id not in old and is_empty:
            remove_value_mask(model.get_submodule(name), target)
        elif target_id in new:
            stay.append(ValueMask(name, target, tuple(present.mask.shape), present.method))
    return tuple(stay)


def full_name(module: str, name: str) -> str:
    """The name in the model of a module's parameter or buffer."""
    return f"{module}.{name}" if module else name


def _masked(module: nn.Module, target: str, method: ApplyMethod, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return apply_mask(value, module.get_buffer(buffer_name(target)), method)


def _mask_input(target: str, method: ApplyMethod, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
    change = partial(_masked, module, target, method)
    return replace_input(args, kwargs, target.removeprefix("_input_"), forward_arguments(module)[0], change)


def _mask_output(target: str, method: ApplyMethod, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return replace_output(output, target.removeprefix("_output_"), partial(_masked, module, target, method))
