"""The JSON of a plan: read by a strict model, since it may come from a stranger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, JsonValue, TypeAdapter

from raycomp.core.masks import ApplyMethod
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.operators import is_identifier
from raycomp.speedup.graph.value_masks import ValueMask
from raycomp.speedup.surgery.graph_code import added_tensors
from raycomp.storage.documents import Document, parse_document

FORMAT = 1
_WHERE = "plan.json"
_MOST_SURGERIES = 1000
_MOST_ELEMENTS = 2**27
"""Of all masks and constants that a plan adds to a model."""

_Number = Annotated[int, Field(ge=0, lt=2**31)]


def _applied_by(method: Any) -> ApplyMethod:
    return ValueMask("", "", (), method).method


class CutText(Document):
    tensor: str
    dim: _Number
    size: _Number
    keep: _Number


class BlockCutText(Document):
    tensor: str
    shape: Annotated[list[_Number], Field(min_length=2, max_length=2)]
    blocks: list[Annotated[list[_Number], Field(min_length=2, max_length=2)]]


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
    shape: list[_Number]
    method: Annotated[ApplyMethod, BeforeValidator(_applied_by)] = "mul"


class ActivationCutText(Document):
    module: str
    target: str
    dim: _Number
    size: _Number
    keep: _Number


class SurgeryText(Document):
    cuts: list[CutText]
    block_cuts: list[BlockCutText]
    attributes: list[AttributeText]
    biases: list[NewBiasText]
    value_masks: list[ValueMaskText]
    activations: list[ActivationCutText]
    graph: dict[str, JsonValue] | None


class PlanText(Document):
    format: int
    keep: list[list[_Number]]
    surgeries: Annotated[list[SurgeryText], Field(max_length=_MOST_SURGERIES)]

    def kept(self, number: int, size: int) -> tuple[int, ...]:
        """The coordinates of an entry of the table, out of `size`.

        Raises:
            SpeedupError: they aren't there, don't ascend, or go beyond the size.
        """
        keep = tuple(self.keep[number]) if number < len(self.keep) else None
        if keep is None or (keep and keep[-1] >= size) or any(b <= a for a, b in pairwise(keep)):
            raise _wrong(f"the coordinates {number} aren't there, don't ascend, or go beyond the size {size}")
        return keep


_ADAPTER = TypeAdapter(PlanText)


def read_plan(text: str | bytes) -> PlanText:
    """A plan's text, checked as far as it can be without the model.

    Raises:
        SpeedupError: it isn't a plan.
    """
    plan = parse_document(_ADAPTER, text, "a surgery plan", _WHERE, SpeedupError)
    if plan.format != FORMAT:
        raise _wrong(f"it has format {plan.format}, this version of raycomp reads {FORMAT}")
    for surgery in plan.surgeries:
        _check(surgery, plan)
    elements = sum(math.prod(shape) for shape in _added(plan.surgeries))
    if elements > _MOST_ELEMENTS:
        raise _wrong(f"it adds masks and constants of {elements:,} elements, at most {_MOST_ELEMENTS:,} may be")
    return plan


def _check(surgery: SurgeryText, plan: PlanText) -> None:
    odd = next((a.name for a in surgery.attributes if not is_identifier(a.name) or a.name.startswith("_")), None)
    if odd is not None:
        raise _wrong(f"{odd!r} is no attribute that states a size")
    # What is cut again and again makes much work of little text.
    cuts = [*((cut.tensor, cut.dim) for cut in surgery.cuts), *((cut.tensor, "blocks") for cut in surgery.block_cuts)]
    if len(set(cuts)) != len(cuts):
        raise _wrong("a tensor is cut twice in the same dimension")
    for cut in surgery.block_cuts:
        rows = [row for row, _ in cut.blocks for row in plan.kept(row, cut.shape[0])]
        if len(set(rows)) != len(rows):
            raise _wrong(f"the groups of {cut.tensor!r} overlap")


def _added(surgeries: Sequence[SurgeryText]) -> Iterator[Sequence[int]]:
    for surgery in surgeries:
        yield from (mask.shape for mask in surgery.value_masks)
        if surgery.graph is not None:
            yield from added_tensors(surgery.graph)


def _wrong(message: str) -> SpeedupError:
    return SpeedupError(f"this is not a surgery plan: {message}", where=_WHERE)
