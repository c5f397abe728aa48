"""A teacher that runs once per batch, however many distillers hold the student against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raycomp.core.parts import replace_output
from raycomp.core.target import TargetId

Predict = Callable[[Any, nn.Module], Any]
Outputs = dict[TargetId, list[Tensor]]


class Teacher:
    """Records the outputs of a teacher's modules.

    It runs in evaluation mode and without gradients; nothing of it changes.

    Args:
        model: the teacher.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._opened = 0
        self._modes: list[tuple[nn.Module, bool]] = []
        self._hooked: dict[TargetId, RemovableHandle] = {}
        self._recorded: Outputs = {}
        self._batch = -1
        self._outputs: list[tuple[Predict, Outputs]] = []

    def open(self, links: Iterable[TargetId], device: torch.device) -> None:
        """A training run of one of its distillers begins: these outputs are recorded."""
        if not self._opened:
            self._modes = [(module, module.training) for module in self.model.modules()]
            self.model.to(device).eval()
        self._opened += 1
        for link in links:
            if link not in self._hooked:
                module = self.model.get_submodule(link.module)
                self._hooked[link] = module.register_forward_hook(self._recording(link))

    def close(self) -> None:
        """A training run ends; after the last one the teacher is as it was handed over."""
        self._opened -= 1
        if self._opened:
            return
        for handle in self._hooked.values():
            handle.remove()
        for module, training in self._modes:
            module.training = training
        self._hooked, self._outputs, self._batch = {}, [], -1

    @torch.no_grad()
    def outputs(self, batch: Any, predict: Predict, number: int) -> Outputs:
        """The recorded outputs for a batch, one entry for each time that a module ran.

        Args:
            batch: what the student had.
            predict: `predict(batch, teacher)` runs the teacher.
            number: of the batch; the same one is not run again.
        """
        if number != self._batch:
            self._batch, self._outputs = number, []
        for done, outputs in self._outputs:
            if done == predict:
                return outputs
        self._recorded = {}
        predict(batch, self.model)
        self._outputs.append((predict, self._recorded))
        return self._recorded

    def _recording(self, link: TargetId) -> Callable[[nn.Module, Any, Any], None]:
        def note(value: Tensor) -> Tensor:
            self._recorded.setdefault(link, []).append(value)
            return value

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            replace_output(output, link.target.removeprefix("_output_"), note)

        return keep
