"""Operators that only move elements: views, transposes, concatenation, splits.

Their index maps come from the operators themselves, run on the numbers of the elements. Between a dimension of an
input and one of an output three things can hold: coordinate by coordinate (a transpose, a part of a concatenation);
each output coordinate comes from one input coordinate (a merge: C, H, W into C·H·W); each input coordinate goes to one
output coordinate (a split: C into groups × C/groups).
"""

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
from raycomp.speedup.rules.index_map import Link, Origin


class Movement(Rule):
    """Moves elements without touching them."""

    sized = True

    def relate(self, call: Call, atoms: Atoms) -> None:
        index_maps = self._index_maps(call)
        for output, index_map in zip(call.outputs, index_maps, strict=True):
            start = 0
            for value in dict.fromkeys(call.inputs):
                end = start + int(np.prod(value.shape, dtype=np.int64))
                here = torch.where((index_map >= start) & (index_map < end), index_map - start, -1)
                self._relate_pair(call, atoms, value, output, Origin(here, value.shape))
                start = end
            self._relate_constant_dims(atoms, output, index_map)

    def _index_maps(self, call: Call) -> list[Tensor]:
        """For each element of each output the number of the input element there, counted over all inputs."""
        numbers = {}
        start = 0
        for value in dict.fromkeys(call.inputs):
            end = start + int(np.prod(value.shape, dtype=np.int64))
            numbers[value] = torch.arange(start, end, dtype=torch.float64).reshape(value.shape)
            start = end
        return [tensor.long() for tensor in call.run(numbers)]

    def _relate_pair(self, call: Call, atoms: Atoms, value: Value, output: Value, origin: Origin) -> None:
        sources = [dim for dim in range(value.ndim) if value.shape[dim] > 1]
        targets = [dim for dim in range(output.ndim) if output.shape[dim] > 1]
        links = [link for s in sources for t in targets if (link := origin.link(s, t)) is not None]
        links.sort(key=lambda link: self._preference(link, atoms, value))
        done_sources: set[int] = set()
        done_targets: set[int] = set()
        for link in links:
            if link.source_dim in done_sources or link.target_dim in done_targets:
                continue
            done_sources.add(link.source_dim)
            done_targets.add(link.target_dim)
            self._apply(link, atoms, value, output)
        for dim in set(sources) - done_sources:
            atoms.fix(atoms.ids(value, dim)[origin.used(dim)], f"{call.label} picks or mixes its coordinates")

    def _preference(self, link: Link, atoms: Atoms, value: Value) -> tuple[bool, bool, int]:
        """Exact matches first, then dimensions that can still be cut, and of a split the innermost part."""
        exact = not link.merges and not link.splits
        ids = atoms.ids(value, link.source_dim)
        free = any(atoms.reason(int(atom)) is None for atom in np.unique(atoms.roots(ids)))
        return (not exact, not free, -link.target_dim)

    def _apply(self, link: Link, atoms: Atoms, value: Value, output: Value) -> None:
        ids = atoms.ids(value, link.source_dim)
        if not link.splits and not atoms.known(output, link.target_dim):
            given = atoms.fresh(output.shape[link.target_dim])
            given[link.target] = ids[link.source]
            atoms.bind(output, link.target_dim, given)
        else:
            atoms.unite(ids[link.source], atoms.ids(output, link.target_dim)[link.target])

    def _relate_constant_dims(self, atoms: Atoms, output: Value, index_map: Tensor) -> None:
        """An output dimension along which nothing changes (an expansion) is free in itself."""
        for dim in range(output.ndim):
            if not atoms.known(output, dim) and bool((index_map == index_map.narrow(dim, 0, 1)).all()):
                atoms.ids(output, dim)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        return call.run(given)


class ChannelShuffle(Movement):
    """Channels as (groups, C / groups), transposed: the same channels of all groups go, so that it stays a shuffle."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        super().relate(call, atoms)
        ids = atoms.ids(call.inputs[0], 1).reshape(call.arguments["groups"], -1)
        atoms.unite(ids.ravel(), np.tile(ids[0], len(ids)))


class View(Movement):
    """A new shape for the same elements."""

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        name = "size" if "size" in call.arguments else "shape"
        return {name: list(kept.shape(call.output))}

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        # Not by the operator: a view asks for the strides that the model's own tensor had.
        return [given[call.inputs[0]].reshape(call.output.shape)]


class Unflatten(Movement):
    """One dimension into several."""

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        dim = call.arguments["dim"] % call.inputs[0].ndim
        parts = len(call.arguments["sizes"])
        return {"sizes": list(kept.shape(call.output)[dim : dim + parts])}


class Expand(Movement):
    """Repeats dimensions of size 1."""

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        return {"size": list(kept.shape(call.output))}


class Split(Movement):
    """Parts of one dimension, as many coordinates in each as stay."""

    resized_operator = "aten.split_with_sizes.default"

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        dim = call.arguments["dim"]
        return {"split_sizes": [kept.size(output, dim) for output in call.outputs]}


class Slice(Movement):
    """A stretch of one dimension."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        super().relate(call, atoms)
        if call.arguments.get("step", 1) != 1:
            atoms.fix_dim(call.inputs[0], call.arguments["dim"], f"{call.label} counts its coordinates")

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        arguments = call.arguments
        stays = kept.mask(call.inputs[0], arguments["dim"])
        if stays.all():
            return {}
        if "length" in arguments:
            start = arguments["start"] % len(stays)
            return {"start": int(stays[:start].sum()), "length": kept.size(call.output, arguments["dim"])}
        start, end, _ = slice(arguments["start"], arguments["end"]).indices(len(stays))
        return {"start": int(stays[:start].sum()), "end": int(stays[:end].sum())}


class Select(Movement):
    """One coordinate of a dimension."""

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        stays = kept.mask(call.arguments["self"], call.arguments["dim"])
        index = call.arguments["index"] % len(stays)
        return {"index": int(stays[:index].sum())}


_MOVEMENTS = """
flatten squeeze unsqueeze permute transpose t movedim swapaxes swapdims cat concat stack unbind flip repeat tile
pixel_shuffle pixel_unshuffle repeat_interleave.self_int numpy_T mT adjoint
slice_scatter select_scatter
""".split()  # noqa: SIM905
RULES.register(Movement(), *(f"aten.{name}" for name in _MOVEMENTS))
RULES.register(ChannelShuffle(), "aten.channel_shuffle", "aten.native_channel_shuffle")
RULES.register(View(), "aten.view", "aten.reshape", "aten._unsafe_view", "aten.view_copy")
RULES.register(Unflatten(), "aten.unflatten")
RULES.register(Expand(), "aten.expand", "aten.broadcast_to")
RULES.register(Split(), "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
RULES.register(Slice(), "aten.slice", "aten.narrow")
RULES.register(Select(), "aten.select")
