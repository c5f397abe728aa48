"""The types of single values, which quote what is wrong and say what would be right; and words that errors share."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

KeyPath = tuple[str | int, ...]
_T = TypeVar("_T")
_LONGEST = 80
_PARTS = re.compile(r"\[(0|[1-9][0-9]*)\]|([^.\[\]]+)")
_PATH = re.compile(r"(?:[^.\[\]]+|\[(?:0|[1-9][0-9]*)\])(?:\.[^.\[\]]+|\[(?:0|[1-9][0-9]*)\])*")
_NUMBER = re.compile(r"0|[1-9][0-9]*")
PATHS = "write a path of keys such as training.seed or stages[0].training.epochs"
"""The remedy for a text that `parse_path` takes for none."""


def closest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that a misspelt name probably means."""
    lowered = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name[:_LONGEST].lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def nearest(name: str, choices: Iterable[str], *, limit: int = 12) -> str:
    """A remedy for a name that is not among `choices`: the one that was probably meant, or what there is."""
    names = [choice for choice in dict.fromkeys(choices) if choice]
    close = closest(name, names)
    if close:
        return f"did you mean '{close}'?"
    if not names:
        return "there is none to choose from"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"choose from {', '.join(names[:limit])}{rest}"


def shown(value: object) -> str:
    """A value as an error quotes it, in one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    if isinstance(value, BaseModel) or "\n" in text:
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def format_path(path: Sequence[str | int], root: str = "") -> str:
    """`("stages", 0, "name")` as `stages[0].name`, behind `root` if there is one."""
    text = root
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_spelled(part)}" if text else _spelled(part)
    return text


def _spelled(key: str) -> str:
    """A key as a path shows it: in one line, and no longer than can be read."""
    key = key if key.isprintable() else repr(key)[1:-1]
    return key if len(key) <= _LONGEST else key[: _LONGEST - 3] + "..."


def parse_path(text: str) -> KeyPath:
    """The inverse of `format_path`; also takes `stages.0.name`. What is written in another way names nothing."""
    if not _PATH.fullmatch(text):
        return ()
    parts = _PARTS.findall(text)
    return tuple(int(index or name) if _NUMBER.fullmatch(index or name) else name for index, name in parts)


def expects(text: str) -> WrapValidator:
    """An annotation for a leaf type: whatever is wrong, the error quotes the value and says what would be right."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "value", "{message}", {"message": f"got {shown(value)}", "remedy": f"should be {text}"}
            ) from None

    return WrapValidator(check)


def at_most(limit: int) -> AfterValidator:
    """An annotation for a number: one above `limit` is refused."""

    def check(value: int) -> int:
        if value > limit:
            raise refuse(f"got {shown(value)}", f"should be at most {limit}")
        return value

    return AfterValidator(check)


def refuse(message: str, remedy: str = "") -> PydanticCustomError:
    """The error that a field validator raises."""
    return PydanticCustomError("value", "{message}", {"message": message, "remedy": remedy})


def _writable(value: JsonValue) -> JsonValue:
    """Refuses what no JSON file can hold."""
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


def _list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Items = Annotated[tuple[_T, ...], BeforeValidator(_list_as_tuple)]
"""A list in a file, a tuple in Python."""
SomeItems = Annotated[tuple[_T, ...], Field(min_length=1), BeforeValidator(_list_as_tuple)]
"""Such a list with at least one item."""

Text = Annotated[
    str,
    Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$"),
    expects("a text that is not empty, without control characters"),
]
Flag = Annotated[bool, expects("true or false")]
Number = Annotated[float, expects("a number")]
Positive = Annotated[float, Field(gt=0), expects("a number above 0")]
NonNegative = Annotated[float, Field(ge=0), expects("a number, at least 0")]
Json = Annotated[
    JsonValue,
    AfterValidator(_writable),
    expects("plain data: texts, finite numbers, true, false, null, lists and mappings of these"),
]
Count = Annotated[int, Field(ge=1), expects("a whole number, at least 1"), at_most(10**9)]
CountOrZero = Annotated[int, Field(ge=0), expects("a whole number, at least 0"), at_most(10**9)]
Processes = Annotated[int, Field(ge=1), expects("a whole number, at least 1"), at_most(10_000)]
Seed = Annotated[int, Field(ge=0), expects("a whole number, at least 0"), at_most(2**63 - 1)]
Slug = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"),
    expects("a name of at most 63 letters, digits, '-', '_' and '.', that starts with a letter or a digit"),
]
