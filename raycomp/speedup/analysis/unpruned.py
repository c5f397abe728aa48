"""What masks name and speedup leaves, with the reasons."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from raycomp.core.masks import Masks
from raycomp.core.target import target_kind
from raycomp.results.summary import Unpruned
from raycomp.speedup.analysis.analyse import Analysis, state_by_name
from raycomp.speedup.analysis.decide import masked_slices
from raycomp.speedup.graph.atoms import Ids
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.graph.value_masks import buffer_name, full_name
from raycomp.speedup.rules.base import Bools

_BYPASSED = "its mask is bypassed in training"


def unpruned(analysis: Analysis, model: nn.Module, masks: Masks) -> tuple[Unpruned, ...]:
    """What the masks name and the decision leaves, by module, dimension and reason.

    A channel is named once for each layer: not again for the layer's bias, nor for norms and values that follow it.

    Args:
        analysis: what was found.
        model: the analysed model.
        masks: its masks.
    """
    study = _Study(analysis, model)
    found: list[Unpruned] = []
    named: set[int] = set()
    for name, targets in sorted(masks.items(), key=lambda item: all(_follows(*each) for each in item[1].items())):
        seen: set[int] = set()
        for target in sorted(targets, key=lambda each: each != "weight"):
            if target == "bias" and "weight" in targets:
                continue
            before = seen | named if _follows(target, targets[target]) else set(seen)
            for dim, roots in study.left(name, target, targets[target] == 0):
                fresh = [root for root in roots if root not in before]
                seen.update(root for root in fresh if root >= 0)
                bypassed = masks.method(name, target) == "bypass"
                reasons = Counter(_BYPASSED if bypassed else study.reason(root, name) for root in fresh)
                found += [Unpruned(name, dim, count, reason) for reason, count in reasons.items()]
        named |= seen
    return tuple(found)


def _follows(target: str, mask: Tensor) -> bool:
    """Whether the mask is one of channels that a layer's weight makes."""
    return mask.ndim < 2 or target_kind(target) != "parameter"


class _Study:
    def __init__(self, analysis: Analysis, model: nn.Module) -> None:
        self.analysis = analysis
        self.by_name = state_by_name(analysis.graph, model)
        self.unmasked_makers: dict[int, list[str]] = {}
        for call in analysis.graph.calls:
            made = analysis.atoms.roots(analysis.rules.find(call).makes(call, analysis.atoms))
            for root in set(made.tolist()) - self._masked_by(call):
                self.unmasked_makers.setdefault(root, []).append(call.owner)

    def _masked_by(self, call: Call) -> set[int]:
        atoms, masked = self.analysis.atoms, self.analysis.masked
        found: set[int] = set()
        for value in call.inputs:
            if value in masked and value.ndim >= 2:
                for dim in range(value.ndim):
                    found.update(atoms.roots(masked_slices(atoms.ids(value, dim), masked[value], dim)).tolist())
        return found

    def left(self, module: str, target: str, mask: Tensor) -> list[tuple[int, list[int]]]:
        """For each dimension of a mask, the atoms of its masked coordinates that stay, one for each coordinate."""
        own = target if target_kind(target) == "parameter" else buffer_name(target)
        value = self.by_name.get(full_name(module, own))
        found = []
        for dim, coordinates in _masked_coordinates(mask):
            roots = np.full(int(coordinates.sum()), -1) if value is None else self._roots(value, dim, coordinates)
            stays = [root for root in roots.tolist() if root < 0 or not self.analysis.decision.removed[root]]
            if stays:
                found.append((dim, stays))
        return found

    def _roots(self, value: Value, dim: int, coordinates: Bools) -> Ids:
        """The atoms of coordinates; a grouped weight's column stands for a channel of each group."""
        atoms = self.analysis.atoms
        for each in self.analysis.decision.channels:
            if each.weight is value and dim == 1:
                return atoms.roots(each.columns.reshape(each.groups, -1)[:, coordinates].ravel())
        return atoms.roots(atoms.ids(value, dim)[coordinates])

    def reason(self, root: int, module: str) -> str:
        """Why an atom stays; where another layer makes it, too, and doesn't mask it, that layer is named."""
        if root < 0:
            return "forward() does not use it"
        never = self.analysis.atoms.reason(root)
        if never is not None:
            return never
        others = sorted({name for name in self.unmasked_makers.get(root, ()) if name != module})
        if others:
            return f"it is shared with {', '.join(repr(name) for name in others)}, not masked there"
        return self.analysis.decision.reasons[root]


def _masked_coordinates(mask: Tensor) -> list[tuple[int, Bools]]:
    """For each of a mask's dimensions, the coordinates that are masked throughout, beside those of earlier ones."""
    found = []
    rest = mask
    for dim in range(mask.ndim):
        if rest.numel() == 0:
            break
        whole = rest.movedim(dim, 0).reshape(rest.shape[dim], -1).all(dim=1)
        if whole.any():
            found.append((dim, whole.cpu().numpy()))
        rest = rest.index_select(dim, torch.nonzero(~whole).reshape(-1))
    return found
