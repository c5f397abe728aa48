"""A stored calibration, read by a strict model."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ConfigDict, JsonValue, TypeAdapter
from typing_extensions import TypeAliasType

from raycomp.core.moments import Calibration
from raycomp.pipeline.ending.artifact import CALIBRATION
from raycomp.storage.documents import Document, ManyNamed, parse_document

Numbers = TypeAliasType("Numbers", "float | list[Numbers]")


class _Range(Document):
    """One target's range; what else is said of it (data type, granularity, …) is kept as it is."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    scale: Numbers
    zero_point: Numbers
    tracked_min: Numbers
    tracked_max: Numbers

    def values(self) -> dict[str, Any]:
        """The values by name, with tensors."""
        floats = {name: torch.tensor(getattr(self, name)) for name in ("scale", "tracked_min", "tracked_max")}
        return {**self.model_dump(), **floats, "zero_point": torch.tensor(self.zero_point, dtype=torch.int32)}


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
    return {module: {name: found.values() for name, found in by.items()} for module, by in read.targets.items()}
