"""A stored calibration, read by a strict model."""

from __future__ import annotations

from pydantic import ConfigDict, JsonValue, TypeAdapter
from typing_extensions import TypeAliasType

from raycomp.core.calibration import NUMBERS, canonical_calibration
from raycomp.core.moments import Calibration
from raycomp.errors import ArtifactError, CompressionError
from raycomp.pipeline.ending.artifact import CALIBRATION
from raycomp.storage.documents import Document, ManyNamed, parse_document

Numbers = TypeAliasType("Numbers", "float | list[Numbers]")


class _Range(Document):
    """One target's range; what else is said of it is judged with its numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    scale: Numbers
    zero_point: Numbers
    tracked_min: Numbers
    tracked_max: Numbers


class _Calibration(Document):
    folds: JsonValue
    targets: ManyNamed[ManyNamed[_Range]]


_ADAPTER = TypeAdapter(_Calibration)


def read_calibration(text: bytes) -> Calibration:
    """The calibration that `write_statistics` wrote, with tensors again.

    Raises:
        ArtifactError: it is something else.
    """
    read = parse_document(_ADAPTER, text, "a calibration", CALIBRATION)
    try:
        return canonical_calibration(read.model_dump()["targets"], NUMBERS)
    except CompressionError as error:
        raise ArtifactError(f"{error.where}: {error.message}", where=CALIBRATION, remedy=error.remedy) from None
