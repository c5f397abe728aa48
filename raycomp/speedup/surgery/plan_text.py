"""The JSON of a plan: read by a strict model, since it may come from a stranger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, JsonValue, Strict, TypeAdapter

from raycomp.core.masks import ApplyMethod
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.operators import is_identifier
from raycomp.speedup.graph.value_masks import ValueMask
from raycomp.speedup.surgery.graph_code import added_tensors
from raycomp.storage.documents import Document, Many, parse_document

FORMAT = 1
_WHERE = "plan.json"
_MOST_SURGERIES = 1000
_MOST_ELEMENTS = 2**27
"""Of all masks and constants that a plan adds to a model, where nothing else says how many there are."""

_Number = Annotated[int, Field(ge=0, lt=2**31)]


def _applied_by(method: Any) -> ApplyMethod:
    return ValueMask("", "", (), method).method


def _ascending(keep: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in pairwise(keep)):
        raise ValueError("the coordinates don't ascend")
    return keep


class CutText(Document):
    tensor: str
    dim: _Number
    size: _Number
    keep: _Number


class BlockCutText(Document):
    tensor: str
    shape: Annotated[Many[_Number], Field(min_length=2, max_length=2)]
    blocks: Many[Annotated[Many[_Number], Field(min_length=2, max_length=2)]]


class AttributeText(Document):
    module: str
    name: str
    old: _Number
    new: _Number


class NewBiasText(Document):
    module: str
    size: _Number


class ValueMaskText(Document):
    module: str
    target: Annotated[str, Field(pattern=r"^_(input|output)_\w+$")]
    shape: Many[_Number]
    method: Annotated[ApplyMethod, BeforeValidator(_applied_by)] = "mul"


class ActivationCutText(Document):
    module: str
    target: str
    dim: _Number
    size: _Number
    keep: _Number


class SurgeryText(Document):
    cuts: Many[CutText]
    block_cuts: Many[BlockCutText]
    attributes: Many[AttributeText]
    biases: Many[NewBiasText]
    value_masks: Many[ValueMaskText]
    activations: Many[ActivationCutText]
    graph: dict[str, JsonValue] | None


class PlanText(Document):
    format: int
    keep: Many[Annotated[tuple[_Number, ...], Strict(False), FailFast(), AfterValidator(_ascending)]]
    surgeries: Annotated[Many[SurgeryText], Field(max_length=_MOST_SURGERIES)]

    def kept(self, number: int, size: int) -> tuple[int, ...]:
        """The coordinates of an entry of the table, out of `size`.

        Raises:
            SpeedupError: they aren't there, or go beyond the size.
        """
        if number >= len(self.keep) or (self.keep[number] and self.keep[number][-1] >= size):
            raise _wrong(f"the coordinates {number} aren't there, or go beyond the size {size}")
        return self.keep[number]


_ADAPTER = TypeAdapter(PlanText)


def read_plan(text: str | bytes, most_added: int = _MOST_ELEMENTS) -> PlanText:
    """A plan's text, checked as far as it can be without the model.

    Args:
        text: JSON.
        most_added: elements of all masks and constants that it may add to a model.

    Raises:
        SpeedupError: it isn't a plan.
    """
    plan = parse_document(_ADAPTER, text, "a surgery plan", _WHERE, SpeedupError)
    if plan.format != FORMAT:
        raise _wrong(f"it has format {plan.format}, this version of raycomp reads {FORMAT}")
    for surgery in plan.surgeries:
        _check(surgery, plan)
    elements = sum(math.prod(shape) for shape in _added(plan.surgeries))
    if elements > most_added:
        raise _wrong(f"it adds masks and constants of {elements:,} elements, at most {most_added:,} may be")
    return plan


def _check(surgery: SurgeryText, plan: PlanText) -> None:
    odd = next((a.name for a in surgery.attributes if not is_identifier(a.name) or a.name.startswith("_")), None)
    if odd is not None:
        raise _wrong(f"{odd!r} is no attribute that states a size")
    grown = next((a for a in surgery.attributes if a.new > a.old), None)
    if grown is not None:
        raise _wrong(f"{grown.name!r} of {grown.module!r} grows from {grown.old} to {grown.new}")
    # What is cut again and again makes much work of little text.
    cuts = [*((cut.tensor, cut.dim) for cut in surgery.cuts), *((cut.tensor, "blocks") for cut in surgery.block_cuts)]
    if len(set(cuts)) != len(cuts):
        raise _wrong("a tensor is cut twice in the same dimension")
    for cut in surgery.block_cuts:
        groups = [plan.kept(rows, cut.shape[0]) for rows, _ in cut.blocks]
        # Counted first: a few lists, named again and again, would make a long one.
        if sum(map(len, groups)) > cut.shape[0] or len(set(chain(*groups))) != sum(map(len, groups)):
            raise _wrong(f"the groups of {cut.tensor!r} overlap")


def _added(surgeries: Sequence[SurgeryText]) -> Iterator[Sequence[int]]:
    for surgery in surgeries:
        yield from (mask.shape for mask in surgery.value_masks)
        if surgery.graph is not None:
            yield from added_tensors(surgery.graph)


def _wrong(message: str) -> SpeedupError:
    return SpeedupError(f"this is not a surgery plan: {message}", where=_WHERE)
