"""Applies a plan to a live model: the user's classes, hierarchy and names stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.value_masks import restore_value_mask
from raycomp.speedup.surgery.graph_code import graph_from_json
from raycomp.speedup.surgery.plan import Attribute, BlockCut, Cut, NewBias, Plan, Surgery
from raycomp.speedup.surgery.pretrained import settle_config_


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Repeats surgery on a fresh instance of the model that was cut.

    Args:
        model: an instance of the same class with the same arguments; it is changed in place.
        plan: the plan, as `ModelSpeedup.plan` gave it.

    Returns:
        The model (or the graph module that replaces it, where its code states sizes as constants), of the shapes
        of the sped-up one; a Hugging Face model's config says them where it can. `load_state_dict(state, strict=True)`
        then makes it the sped-up one.

    Raises:
        SpeedupError: the model isn't the one that the plan was made for.
    """

    for surgery in plan.surgeries:
        for bias in surgery.biases:
            _add_bias(model, bias)
        cut(model, surgery)
        for value_mask in surgery.value_masks:
            restore_value_mask(_module(model, value_mask.module), value_mask)
        if surgery.graph is not None:
            model = graph_from_json(model, surgery.graph)
    if plan.surgeries:
        settle_config_(model, plan.surgeries)
    return model


def cut(model: nn.Module, surgery: Surgery) -> None:
    """Cuts parameters, buffers and attributes of a model in place; a tensor with several names stays one tensor."""
    new: dict[int, Tensor] = {}
    keep_alive: list[Tensor] = []
    for name in dict.fromkeys(each.tensor for each in _tensor_cuts(surgery)):
        old = _find(model, name)
        keep_alive.append(old)
        new[id(old)] = _like(old, cut_tensor(old.detach(), name, surgery).clone())
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None and id(tensor) in new:
                    store[key] = new[id(tensor)]  # type: ignore[assignment]
    for attribute in surgery.attributes:
        _set(model, attribute)


def cut_tensor(tensor: Tensor, name: str, surgery: Surgery) -> Tensor:
    """What a surgery leaves of a tensor with this full name, or of another one of its shape.

    Raises:
        SpeedupError: the tensor has another shape than the surgery expects.
    """
    for each in _tensor_cuts(surgery):
        if each.tensor == name:
            tensor = _sliced(tensor, each)
    return tensor


def _tensor_cuts(surgery: Surgery) -> tuple[Cut | BlockCut, ...]:
    return (*surgery.block_cuts, *surgery.cuts)


def _sliced(tensor: Tensor, each: Cut | BlockCut) -> Tensor:
    if isinstance(each, Cut):
        if tensor.ndim <= each.dim or tensor.shape[each.dim] != each.size:
            _refuse(each.tensor, f"{each.size} in dimension {each.dim}", tensor)
        return tensor.index_select(each.dim, torch.tensor(each.keep, device=tensor.device))
    if tuple(tensor.shape[:2]) != each.shape:
        _refuse(each.tensor, f"{each.shape} in its first dimensions", tensor)
    return torch.cat([tensor[list(block.rows)][:, list(block.columns)] for block in each.blocks])


def _refuse(name: str, expected: str, tensor: Tensor) -> None:
    raise SpeedupError(
        f"the plan expects {expected}, and the tensor has the shape {tuple(tensor.shape)}",
        where=name,
        remedy="make the model with the arguments that it had when it was sped up",
    )


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _set(model: nn.Module, attribute: Attribute) -> None:
    module = _module(model, attribute.module)
    # Among the instance's own values: a property of the class could run anything.
    present = vars(module).get(attribute.name)
    if type(present) is not int or present not in (attribute.old, attribute.new):
        raise SpeedupError(
            f"the plan expects {attribute.name} = {attribute.old}, and it is {present}",
            where=attribute.module,
            remedy="make the model with the arguments that it had when it was sped up",
        )
    setattr(module, attribute.name, attribute.new)


def _add_bias(model: nn.Module, bias: NewBias) -> None:
    module = _module(model, bias.module)
    weight = module._parameters.get("weight")
    if (
        weight is None
        or module._parameters.get("bias", weight) is not None
        or bias.size not in _outputs(module, weight)
    ):
        raise SpeedupError(f"the plan gives a bias of {bias.size} to a module that can't have it", where=bias.module)
    module.bias = nn.Parameter(weight.new_zeros(bias.size), requires_grad=weight.requires_grad)


def _outputs(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """How many outputs a weight can stand for: they are in its first dimension, or (transposed) in its second."""
    groups = vars(module).get("groups", 1)
    return (*weight.shape[:1], *(size * groups for size in weight.shape[1:2]))


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SpeedupError("the plan names a module that the model lacks", where=name) from None


def _find(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    module = _module(model, path)
    tensor = module._parameters.get(last, module._buffers.get(last))
    if tensor is None:
        raise SpeedupError("the plan names a parameter that the model lacks", where=name)
    return tensor
