"""The shapes of targets, and where their channels are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from raycomp.core.attach import forward_arguments, original_parameter, user_class
from raycomp.core.model import device_of, evaluation_mode
from raycomp.core.parts import as_call, replace_input, replace_output
from raycomp.core.target import TargetId, target_kind
from raycomp.errors import CompressionError, RaycompError

_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RMSNorm, nn.MultiheadAttention)


@dataclass(frozen=True)
class Layout:
    """What is known of a target before it is compressed.

    Args:
        shape: its shape; None for an input or output where no example input was there to tell.
        channel_dim: of a parameter the dimension of its output channels, of an input or output that of its channels
            (-1: the last one); None where the module's class doesn't tell.
        groups: of a transposed convolution's weight: its output channels are spread over this many parts of dimension 0
            and, within them, over `channel_dim`.
        value_channel_dim: where the channels of the module's inputs and outputs are, as far as its class tells.
        is_parameter: whether the target is a parameter.
        class_rank: of an input or output, the number of dimensions that the module's class tells.
        is_ambiguous: whether several dimensions of an input or output may hold the channels that it follows.
    """

    shape: tuple[int, ...] | None
    channel_dim: int | None
    groups: int = 1
    value_channel_dim: int | None = None
    is_parameter: bool = True
    class_rank: int | None = None
    is_ambiguous: bool = False

    @property
    def rank(self) -> int | None:
        """The number of dimensions, where it is known."""
        return self.class_rank if self.shape is None else len(self.shape)

    @property
    def output_channels(self) -> int:
        """How many output channels a parameter has."""
        assert self.shape is not None
        return self.groups * self.shape[self.channel_dim or 0] if self.shape else 1

    @property
    def positive_channel_dim(self) -> int | None:
        """The channels' dimension counted from the front, where the rank or the class tells."""
        if self.channel_dim is None or self.channel_dim >= 0 or self.rank is None:
            return self.channel_dim
        return self.channel_dim + self.rank

    def channels(self, value: Tensor) -> Tensor:
        """A target's values as [output channels, everything else]."""
        dim = self.channel_dim or 0
        if self.groups == 1 or value.dim() < 2:
            moved = value.movedim(dim, 0) if value.dim() > 1 else value
            return moved.reshape(moved.shape[0], -1)
        parts = value.reshape(self.groups, value.shape[0] // self.groups, *value.shape[1:])
        return parts.movedim(dim + 1, 1).reshape(self.groups * value.shape[dim], -1)


def layouts(model: nn.Module, target_ids: Iterable[TargetId], example: Any = None) -> dict[TargetId, Layout]:
    """The layout of each target; of inputs and outputs from one forward pass of the example, where there is one."""
    wanted = list(target_ids)
    values = [each for each in wanted if target_kind(each.target) != "parameter"]
    shapes = traced_shapes(model, values, example) if values and example is not None else {}
    return {each: layout_of(model, each, shapes.get(each)) for each in wanted}


def layout_of(model: nn.Module, target_id: TargetId, traced: tuple[int, ...] | None = None) -> Layout:
    """The layout of one target; of an input or output as far as the module's class and a traced shape tell."""
    module = model.get_submodule(target_id.module)
    of_values = _value_channel_dim(module)
    if target_kind(target_id.target) != "parameter":
        rank = len(module.kernel_size) + 2 if isinstance(module, _ConvNd) else None
        if rank is not None and traced is not None and len(traced) < rank:
            message = f"the example input gives it the shape {traced}, without a batch dimension"
            raise CompressionError(message, where=str(target_id), remedy="give an example of two samples")
        return Layout(traced, of_values, value_channel_dim=of_values, is_parameter=False, class_rank=rank)
    shape = tuple(original_parameter(module, target_id.target).shape)
    if target_id.target != "weight" or len(shape) < 2:
        return Layout(shape, 0, value_channel_dim=of_values)
    groups = module.groups if isinstance(module, _ConvTransposeNd) else 1
    return Layout(shape, output_channel_dim(module), groups, of_values)


def output_channel_dim(module: nn.Module) -> int:
    """The dimension of a weight's output channels: 0, but 1 for transposed convolutions and transformers' Conv1D."""
    return 1 if isinstance(module, _ConvTransposeNd) or _is_transformers_conv(module) else 0


def traced_shapes(model: nn.Module, target_ids: Iterable[TargetId], example: Any) -> dict[TargetId, tuple[int, ...]]:
    """The shapes of inputs and outputs when the model runs on the example; what it doesn't reach is left out.

    Raises:
        CompressionError: the model doesn't run on the example.
    """
    return {key: tuple(value.shape) for key, value in observed_values(model, target_ids, example).items()}


def observed_values(model: nn.Module, target_ids: Iterable[TargetId], example: Any) -> dict[TargetId, Tensor]:
    """The values of inputs and outputs when the model first passes them on the example; else as `traced_shapes`."""
    seen: dict[TargetId, Tensor] = {}
    handles = []
    for target_id in target_ids:
        module = model.get_submodule(target_id.module)

        def note(value: Any, target_id: TargetId = target_id) -> Any:
            if isinstance(value, Tensor):
                seen.setdefault(target_id, value.detach())
            return value

        if target_kind(target_id.target) == "output":
            key = target_id.target.removeprefix("_output_")
            handles.append(module.register_forward_hook(lambda m, a, out, key=key, note=note: _look(out, key, note)))
        else:
            key = target_id.target.removeprefix("_input_")
            look = lambda m, args, kwargs, key=key, note=note: _look_at_input(m, args, kwargs, key, note)  # noqa: E731
            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    args, kwargs = as_call(pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device_of(model)), example))
    try:
        with evaluation_mode(model), torch.no_grad():
            model(*args, **kwargs)
    except RaycompError:
        raise
    except Exception as error:  # whatever the user's forward raises
        message = f"the model doesn't run on the example input: {type(error).__name__}: {error}"
        raise CompressionError(message, remedy="give an example input that its forward takes") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _look(output: Any, key: str, note: Any) -> None:
    replace_output(output, key, note)


def _look_at_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: str, note: Any) -> None:
    replace_input(args, kwargs, key, forward_arguments(module)[0], note)


def _value_channel_dim(module: nn.Module) -> int | None:
    if isinstance(module, _ConvNd | _NormBase | nn.GroupNorm):
        return 1
    return -1 if isinstance(module, _LAST) or _is_transformers_conv(module) else None


def _is_transformers_conv(module: nn.Module) -> bool:
    return user_class(module).__name__ == "Conv1D" and hasattr(module, "nf")
