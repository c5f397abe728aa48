"""JSON documents of strangers: read by a strict model, or refused in one error."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from raycomp.config.values import format_path, shown
from raycomp.errors import ArtifactError, RaycompError

LONGEST_DOCUMENT = 256 * 1024**2
_MOST_PARTS, _BYTES_OF_A_PART = 2**18, 26
"""Lists and objects in a document, each of which takes a hundred times the memory of its two characters: so many, or
one for so many bytes. An exported program has one for 28 bytes."""
_MOST_ERRORS = 1000
_MOST_KEYS = 20_000
_KEY = re.compile(rb'"\s*:')
_EXACT = ConfigDict(strict=True, extra="forbid")
STRICT = ConfigDict(**_EXACT, frozen=True)

_T = TypeVar("_T")
_C = TypeVar("_C")


class _FailFast(FailFast):
    __hash__ = object.__hash__  # which unions of types need


Many = Annotated[list[_T], _FailFast()]
ManyNamed = Annotated[dict[str, _T], _FailFast()]
ManyFrozen = Annotated[tuple[_T, ...], _FailFast()]
"""Lists, objects and tuples that are refused at their first wrong item: each one that is told takes half a kB."""


class Document(BaseModel):
    """The root of strict models of JSON: no unknown key, no value of another type."""

    model_config = STRICT


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[_C]) -> type[_C]:
    """A class as a `Document` that takes little more memory than its values, for those that come by the thousand."""
    made: Any = dataclass(config=_EXACT, slots=True, frozen=True, kw_only=True)(cls)
    return made  # type: ignore[no-any-return]


def parse_document(
    adapter: TypeAdapter[_T], data: str | bytes, what: str, where: str, kind: type[RaycompError] = ArtifactError
) -> _T:
    """The value that a JSON text holds; nesting and the digits of numbers are limited by the parser.

    Args:
        adapter: the type's.
        data: the text.
        what: what it should be, as the error says it: "a surgery plan".
        where: the file.
        kind: the error's class.

    Raises:
        RaycompError: of `kind`, with the first thing that is wrong, and its key.
    """
    check_extent(data, what, where, kind)
    try:
        if _keys(data) > _MOST_KEYS:
            # Each unknown key that is told takes half a kB: what has too many isn't read so that they are.
            unknown = _keys(data) - _keys(adapter.dump_json(adapter.validate_json(data, extra="ignore")))
            if unknown > _MOST_ERRORS:
                raise kind(f"this is not {what}: {unknown:,} of its keys or more are unknown", where=where)
        return adapter.validate_json(data)
    except ValidationError as error:
        raise not_a_document(error, what, where, kind) from None


def _keys(data: str | bytes) -> int:
    """How many keys a text has, those within its strings included."""
    return sum(1 for _ in _KEY.finditer(data.encode() if isinstance(data, str) else data))


def check_extent(data: str | bytes, what: str, where: str, kind: type[RaycompError] = ArtifactError) -> None:
    """Passes a text of which no more can be made than it is worth.

    Raises:
        RaycompError: of `kind`, where it is too long, or holds too much.
    """
    if len(data) > LONGEST_DOCUMENT:
        raise kind(f"{what} has at most {LONGEST_DOCUMENT:,} bytes, and this one {len(data):,}", where=where)
    parts = data.count("{") + data.count("[") if isinstance(data, str) else data.count(b"{") + data.count(b"[")
    most = max(_MOST_PARTS, len(data) // _BYTES_OF_A_PART)
    if parts > most:
        raise kind(f"{what} of this length has at most {most:,} lists and objects, and this {parts:,}", where=where)


def not_a_document(error: ValidationError, what: str, where: str, kind: type[RaycompError]) -> RaycompError:
    """What pydantic found wrong, as one error of ours."""
    if error.error_count() > _MOST_ERRORS:  # to list them would take a kB for each
        return kind(f"this is not {what}: {error.error_count():,} of its values are wrong", where=where)
    first: Any = error.errors(include_url=False, include_context=False)[0]
    key = format_path([part for part in first["loc"] if not str(part).startswith("function-")])
    got = "" if first["type"] in ("json_invalid", "missing") else f", not {shown(first['input'])}"
    return kind(f"this is not {what}: {f'{key}: ' if key else ''}{first['msg']}{got}", where=where)
