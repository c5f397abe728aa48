"""Layerwise distillation through trained translators."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from raycomp.core.learned import Learns
from raycomp.core.model import device_of
from raycomp.core.target import TargetId
from raycomp.distillation.distiller import LayerwiseDistiller


class Translator(Learns):
    """A trained linear map of the last dimension, from the student's features to the teacher's.

    Args:
        weight: [teacher's features, student's features].
        bias: [teacher's features].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_learned("weight", weight)
        self.register_learned("bias", bias)

    def forward(self, value: Tensor) -> Tensor:
        """The student's value in the teacher's features."""
        return functional.linear(value.to(self.weight.dtype), self.weight, self.bias)


class Adaptive1dLayerwiseDistiller(LayerwiseDistiller):
    """Holds each target, through a trained linear map of its last dimension, against each of its links.

    loss = λ₀·L + Σ λᵢ · Σⱼ d(Tᵢⱼ(sᵢ), tⱼ): student and teacher may differ in width. The maps are learned beside the
    student, begin with the same values on every worker, and are thrown away (Romero et al., FitNets, arXiv:1412.6550).
    """

    @cached_property
    def translators(self) -> dict[tuple[TargetId, TargetId], Translator]:
        """The maps, by target and link."""
        return {}

    def translated(self, target_id: TargetId, link: TargetId, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's output in the teacher's features."""
        key = target_id, link
        if key not in self.translators:
            self._learn(key, *self._drawn(student, teacher.shape[-1]))
        return self.translators[key](student)  # type: ignore[no-any-return]

    def fits(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> bool:
        """Features may differ in number."""
        return student[:-1] == teacher[:-1]

    def combine(self, distances: dict[TargetId, list[Tensor]]) -> dict[TargetId, Tensor]:
        """The sum over the links."""
        return {target_id: torch.stack(links).sum() for target_id, links in distances.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "translators": {
                f"{target_id}>{link}": dict(translator.state_dict())
                for (target_id, link), translator in self.translators.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        keys = {
            f"{target_id}>{link}": (target_id, link) for target_id in self.recorders for link in self.links(target_id)
        }
        for name, values in state["translators"].items():
            device = device_of(self.model)
            self._learn(keys[name], values["weight"].to(device), values["bias"].to(device))

    def _drawn(self, student: Tensor, features: int) -> tuple[Tensor, Tensor]:
        """As `nn.Linear` draws them, from the chain's generator."""
        bound = 1 / sqrt(student.shape[-1])
        drawn = torch.rand(features, student.shape[-1] + 1, generator=self.chain.generator) * 2 * bound - bound
        drawn = drawn.to(device=student.device, dtype=torch.promote_types(student.dtype, torch.float32))
        return drawn[:, :-1], drawn[:, -1]

    def _learn(self, key: tuple[TargetId, TargetId], weight: Tensor, bias: Tensor) -> None:
        self.translators[key] = Translator(weight, bias)
        self.chain.learned.add(self.translators[key].learned().values())
