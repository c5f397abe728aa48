"""Operators that add constant elements: padding, and tensors filled with a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.rules.base import RULES, Kept, Rule


class Pad(Rule):
    """Adds positions at the ends of dimensions; constant ones are free in themselves."""

    sized = True

    def relate(self, call: Call, atoms: Atoms) -> None:
        value, output = call.inputs[0], call.output
        for dim, (before, after) in enumerate(self._amounts(call)):
            if not before and not after:
                atoms.same(value, dim, output, dim)
            elif self._is_constant(call) and min(before, after) >= 0:
                ids = atoms.ids(value, dim)
                if value.shape[dim] == 1:
                    continue
                atoms.bind(output, dim, np.concatenate([atoms.fresh(before), ids, atoms.fresh(after)]))
            else:
                atoms.fix_dim(value, dim, f"{call.label} works on positions")

    def _is_constant(self, call: Call) -> bool:
        return bool(call.arguments.get("mode", "constant") == "constant")

    def _amounts(self, call: Call) -> list[tuple[int, int]]:
        pad = call.arguments["pad"] if "pad" in call.arguments else call.arguments["padding"]
        pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
        return [(0, 0)] * (call.inputs[0].ndim - len(pairs)) + pairs[::-1]

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        taint = given[call.inputs[0]]
        if self._is_constant(call):
            pad = [amount for pair in reversed(self._amounts(call)) for amount in pair]
            return [torch.nn.functional.pad(taint, pad)]
        padded = [dim for dim, amounts in enumerate(self._amounts(call)) if any(amounts)]
        return [taint.mean(dim=padded, keepdim=True).expand(call.output.shape)]

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        name = "pad" if "pad" in call.arguments else "padding"
        if not self._is_constant(call):
            return {}
        amounts: list[int] = []
        for dim, (before, after) in reversed(list(enumerate(self._amounts(call)))):
            if before or after:
                stays = kept.mask(call.output, dim)
                before, after = int(stays[:before].sum()), int(stays[len(stays) - after :].sum())
            amounts += [before, after]
        return {name: amounts[: len(call.arguments[name])]}


class Created(Rule):
    """A tensor filled with a number: every coordinate is free in itself."""

    sized = True

    def relate(self, call: Call, atoms: Atoms) -> None:
        for dim in range(call.output.ndim):
            atoms.ids(call.output, dim)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        # Where nothing but shapes comes from the input, the elements are constants, as they are in static tensors.
        fill = torch.ones if all(value in flow.static for value in call.inputs) else torch.zeros
        return [fill(call.output.shape) + sum(given[v].sum() * 0 for v in call.inputs)]

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        return {"size": list(kept.shape(call.output))}


RULES.register(
    Pad(),
    "aten.pad",
    "aten.constant_pad_nd",
    *(f"aten.{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)
RULES.register(Created(), *(f"aten.{name}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")))
