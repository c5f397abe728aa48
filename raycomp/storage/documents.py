"""JSON documents of strangers: read by a strict model, or refused in one error."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from raycomp.config.values import format_path, shown
from raycomp.errors import ArtifactError, RaycompError

LONGEST_DOCUMENT = 256 * 1024**2
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)

_T = TypeVar("_T")


class Document(BaseModel):
    """The root of strict models of JSON: no unknown key, no value of another type."""

    model_config = STRICT


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
    if len(data) > LONGEST_DOCUMENT:
        raise kind(f"{what} has at most {LONGEST_DOCUMENT:,} bytes, and this one {len(data):,}", where=where)
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        raise not_a_document(error, what, where, kind) from None


def not_a_document(error: ValidationError, what: str, where: str, kind: type[RaycompError]) -> RaycompError:
    """What pydantic found wrong, as one error of ours."""
    first: Any = error.errors(include_url=False, include_context=False)[0]
    key = format_path([part for part in first["loc"] if not str(part).startswith("function-")])
    got = "" if first["type"] in ("json_invalid", "missing") else f", not {shown(first['input'])}"
    return kind(f"this is not {what}: {f'{key}: ' if key else ''}{first['msg']}{got}", where=where)
