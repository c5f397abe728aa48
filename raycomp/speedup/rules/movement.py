"""Operators that only move elements: views, transposes, concatenation, splits.

Their index maps come from the operators themselves, run on the numbers of the elements. Between a dimension of an
input and one of an output three things can hold: coordinate by coordinate (a transpose, a part of a concatenation);
each output coordinate comes from one input coordinate (a merge: C, H, W into C·H·W); each input coordinate goes to one
output coordinate (a split: C into groups × C/groups).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raycomp.speedup.atoms import Atoms, Ids
from raycomp.speedup.flow import Flow
from raycomp.speedup.graph import Call, Value
from raycomp.speedup.rules.base import RULES, Kept, Rule


@dataclass(frozen=True)
class Link:
    """How one dimension of an input and one of an output go together.

    Args:
        source_dim, target_dim: the dimensions.
        source, target: pairs of coordinates that go together.
        merges: whether several output coordinates may come from one input coordinate.
        splits: whether several input coordinates may go to one output coordinate.
    """

    source_dim: int
    target_dim: int
    source: Ids
    target: Ids
    merges: bool
    splits: bool


class Origin:
    """Where the elements of one output come from in one input.

    Args:
        places: the output's shape, holding flat positions in the input, -1 for elements from elsewhere.
        shape: the input's shape.
    """

    def __init__(self, places: Tensor, shape: tuple[int, ...]) -> None:
        self._present = (places >= 0).reshape(-1)
        flat = places.reshape(-1)[self._present]
        self._sources = _unravel(flat, shape)
        everywhere = torch.nonzero(self._present).reshape(-1)
        self._targets = _unravel(everywhere, tuple(places.shape))
        self.source_shape, self.target_shape = shape, tuple(places.shape)

    def link(self, source_dim: int, target_dim: int) -> Link | None:
        """How two dimensions go together; None where they don't."""
        source, target = self._sources[source_dim], self._targets[target_dim]
        size = self.target_shape[target_dim]
        pairs = _distinct(source * size + target, self.source_shape[source_dim] * size)
        sources, targets = pairs // size, pairs % size
        merges = len(torch.unique(targets)) == len(targets)
        splits = len(torch.unique(sources)) == len(sources)
        if not (merges or splits):
            return None
        several_targets = len(torch.unique(sources)) < len(sources)
        several_sources = len(torch.unique(targets)) < len(targets)
        return Link(source_dim, target_dim, sources.numpy(), targets.numpy(), several_targets, several_sources)

    def used(self, source_dim: int) -> Ids:
        """The input coordinates with an element that the output holds."""
        used: Ids = _distinct(self._sources[source_dim], self.source_shape[source_dim]).numpy()
        return used


def _distinct(numbers: Tensor, bound: int) -> Tensor:
    """The distinct numbers in ascending order, without sorting them where a table of all of them is small enough."""
    if bound > max(1_000_000, 4 * len(numbers)):
        distinct: Tensor = torch.unique(numbers)
        return distinct
    table = torch.zeros(bound, dtype=torch.bool)
    table[numbers] = True
    found: Tensor = torch.nonzero(table).reshape(-1)
    return found


def _unravel(flat: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    coordinates = []
    for size in reversed(shape):
        coordinates.append(flat % size)
        flat = flat // size
    return coordinates[::-1]


class Movement(Rule):
    """Moves elements without touching them."""

    sized = True

    def relate(self, call: Call, atoms: Atoms) -> None:
        places = self._places(call)
        for output, tensor in zip(call.outputs, places, strict=True):
            start = 0
            for value in dict.fromkeys(call.inputs):
                end = start + int(np.prod(value.shape, dtype=np.int64))
                here = torch.where((tensor >= start) & (tensor < end), tensor - start, -1)
                self._relate_pair(call, atoms, value, output, Origin(here, value.shape))
                start = end
            self._relate_constant_dims(atoms, output, tensor)

    def _places(self, call: Call) -> list[Tensor]:
        """For each output, the number of the input element in each place, counted over all inputs."""
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

    def _relate_constant_dims(self, atoms: Atoms, output: Value, places: Tensor) -> None:
        """An output dimension along which nothing changes (an expansion) is free in itself."""
        for dim in range(output.ndim):
            if not atoms.known(output, dim) and bool((places == places.narrow(dim, 0, 1)).all()):
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
        return [torch.ones(call.output.shape) + sum(given[v].sum() * 0 for v in call.inputs)]

    def resize(self, call: Call, kept: Kept) -> dict[str, Any]:
        return {"size": list(kept.shape(call.output))}


_PLAIN = """
flatten squeeze unsqueeze permute transpose t movedim swapaxes swapdims cat concat stack unbind flip repeat tile
pixel_shuffle pixel_unshuffle repeat_interleave.self_int numpy_T mT adjoint
slice_scatter select_scatter
""".split()  # noqa: SIM905
RULES.register(Movement(), *(f"aten.{name}" for name in _PLAIN))
RULES.register(ChannelShuffle(), "aten.channel_shuffle", "aten.native_channel_shuffle")
RULES.register(View(), "aten.view", "aten.reshape", "aten._unsafe_view", "aten.view_copy")
RULES.register(Unflatten(), "aten.unflatten")
RULES.register(Expand(), "aten.expand", "aten.broadcast_to")
RULES.register(Split(), "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split")
RULES.register(Slice(), "aten.slice", "aten.narrow")
RULES.register(Select(), "aten.select")
RULES.register(
    Pad(),
    "aten.pad",
    "aten.constant_pad_nd",
    *(f"aten.{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)
RULES.register(Created(), *(f"aten.{name}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")))
