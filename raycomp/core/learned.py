"""What compressors learn beside the model: factors, translators, and what algorithms to come learn.

They belong to the chain: no Parameters of the model, so the user's optimizer, parameter names, clipping and schedules
never meet them, nor does DDP. The chain averages their gradients over the workers itself, and an optimizer of its own
steps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycomp.core.reduction import communication_device, is_distributed, world_size

LEARNING_RATE = 1e-2
"""NNI's, for scores and factors."""


class Learns(nn.Module):
    """A module with learned tensors: buffers that need gradients, which move, copy and save with who holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._learned: list[str] = []

    def register_learned(self, name: str, value: Tensor) -> None:
        """Adds a tensor that is learned, as an attribute of that name."""
        self.register_buffer(name, value.detach().clone().requires_grad_())
        self._learned.append(name)

    def learned(self) -> dict[str, Tensor]:
        """The learned tensors by name."""
        return {name: self.get_buffer(name) for name in self._learned}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The optimizer holds these very tensors: they must stay the same objects, and leaves.
        kept = {name: self._buffers.pop(name) for name in self._learned}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            assert tensor is not None
            with torch.no_grad():
                tensor.data = fn(tensor.data)
                tensor.grad = None if tensor.grad is None else fn(tensor.grad)
            self._buffers[name] = tensor
        return self


class LearnedTensors:
    """All learned tensors of a chain, in an optimizer of their own: Adam without weight decay."""

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] = []
        self._initial: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None

    def add(self, tensors: Iterable[Tensor], learning_rate: float = LEARNING_RATE) -> None:
        """Lets tensors train from now on; those that train already are passed over."""
        held = {id(tensor) for group in self._groups for tensor in group["params"]}
        new = [tensor for tensor in tensors if id(tensor) not in held]
        if not new:
            return
        self._groups.append({"params": new, "lr": learning_rate})
        self._initial += [tensor.detach().clone() for tensor in new]
        if self._optimizer is None:
            self.reset()
        else:
            self._optimizer.add_param_group(dict(self._groups[-1]))

    def reset(self) -> None:
        """A fresh optimizer over the same tensors."""
        groups = [dict(group) for group in self._groups]
        self._optimizer = torch.optim.Adam(groups, weight_decay=0.0) if groups else None

    @torch.no_grad()
    def rewind(self) -> None:
        """Gives every tensor the value that it was added with."""
        for tensor, initial in zip(self.tensors(), self._initial, strict=True):
            tensor.copy_(initial)

    def reduce_gradients(self) -> None:
        """Gives every worker the mean of the workers' gradients, as DDP does for Parameters. A collective.

        A tensor that only some workers used counts as having a gradient of zero on the others.
        """
        tensors = self.tensors()
        if not tensors or not is_distributed():
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            by_dtype.setdefault(tensor.dtype, []).append(tensor.grad)
        for gradients in by_dtype.values():
            device = communication_device(gradients[0].device)
            flat = torch.cat([gradient.reshape(-1).to(device) for gradient in gradients])
            dist.all_reduce(flat)
            flat /= world_size()
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def drop_gradients(self) -> None:
        """Drops the gradients of a step that was never made.

        A loop that skips steps must set gradients to None, as `zero_grad()` does, and not to zero, for that to be seen.
        A scaled loss needs nothing else: Adam's steps don't depend on a constant scale.
        """
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    def step(self) -> None:
        """One optimizer step; the gradients begin anew."""
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and what `rewind` goes back to; the tensors are saved where they stand."""
        return {} if self._optimizer is None else {"optimizer": self._optimizer.state_dict(), "initial": self._initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        if self._optimizer is not None and state:
            self._optimizer.load_state_dict(state["optimizer"])
            pairs = zip(self.tensors(), state["initial"], strict=True)
            self._initial = [initial.to(tensor.device) for tensor, initial in pairs]

    def tensors(self) -> list[Tensor]:
        """All of them, in the order in which they were added."""
        return [tensor for group in self._groups for tensor in group["params"]]
