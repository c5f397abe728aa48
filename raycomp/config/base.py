"""What every settings class shares: strict frozen values, and errors that say everything at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from raycomp.config import nni
from raycomp.config.values import KeyPath, closest, format_path, nearest, shown
from raycomp.errors import ConfigError, Problem

UNKNOWN_KEY = "unknown_key"
UNKNOWN_TYPE = "unknown_type"
_CONFLICT = "conflict"
_OF_KEY = "[key]"  # what pydantic puts behind a key that is itself wrong


@dataclass(frozen=True)
class Conflict:
    """Keys that are right one by one and wrong together.

    Args:
        key: where to report it, relative to the settings that hold the keys.
        message: what is wrong.
        remedy: what would be right.
    """

    key: KeyPath
    message: str
    remedy: str = ""


class Given:
    """What the user gave for some settings, before it is known to be right: absent and mistyped values read as None."""

    def __init__(self, values: object) -> None:
        if isinstance(values, Settings):
            values = values.given_values()
        self.values: Mapping[str, Any] = values if isinstance(values, Mapping) else {}

    def has(self, key: str) -> bool:
        """Whether the key was given, and is not null."""
        return self.values.get(key) is not None

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def sequence(self, key: str) -> tuple[object, ...]:
        value = self.values.get(key)
        return tuple(value) if isinstance(value, list | tuple) else ()

    def child(self, key: str) -> Given:
        return Given(self.values.get(key))

    def children(self, key: str) -> tuple[Given, ...]:
        return tuple(Given(item) for item in self.sequence(key))


class Settings(BaseModel):
    """The root of all settings. Construction raises one `ConfigError` with every problem."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
    )
    older_keys: ClassVar[Mapping[str, str]] = {}
    """What to write instead of keys that NNI had once."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(problems_of(error, values, lambda path: format_path(path, type(self).__name__))) from None

    # Otherwise pydantic would call this method for nested settings too, and stop at the first that is wrong.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def may_mean(cls, given: Given, keys: Collection[str]) -> bool:
        """Whether an unknown key probably stands for one of `keys`: what is missing isn't told beside it."""
        known = cls.key_names()
        unknown = [str(key) for key in given.values if key not in known]
        meant = [cls.older_keys.get(key) or closest(key, known) or "" for key in unknown]
        return any(name.startswith(key) for name in meant for key in keys)

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        """What is wrong with the keys taken together; seen even where single keys are wrong as well."""
        yield from ()

    def given_values(self) -> dict[str, Any]:
        """The values by name, as checks of other settings that hold these see them."""
        return {key: getattr(self, key) for key in type(self).model_fields}

    @classmethod
    def key_names(cls) -> list[str]:
        """The keys as a file spells them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema, with a description of each key: pydantic has none beside some references, and of none that a
        subclass narrows."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, field in cls.model_fields.items():
            fields = [base.model_fields.get(name) for base in cls.__mro__ if issubclass(base, Settings)]
            told = (found.description for found in fields if found is not None and found.description)
            properties[field.alias or name].setdefault("description", next(told, ""))
        return schema

    @model_validator(mode="wrap")
    @classmethod
    def _gather(cls, values: Any, handler: Callable[[Any], Any]) -> Any:
        found = list(cls.conflicts(Given(values))) if isinstance(values, Mapping) else []
        lines = [_line(conflict.key, _CONFLICT, conflict.message, conflict.remedy, values) for conflict in found]
        try:
            result = handler(values)
        except ValidationError as error:
            raised = [dict(line) for line in error.errors(include_url=False)]
            lines = [_explained(cls, line) for line in raised if not _only_looks_short(line)] + lines
        if lines:
            raise ValidationError.from_exception_data(cls.__name__, lines)
        return result


def problems_of(error: ValidationError, raw: object, locate: Callable[[KeyPath], str]) -> list[Problem]:
    """Everything that is wrong, in the order of the settings.

    Args:
        error: what validation of `raw` raised.
        raw: the values as they were given. Parts of an error's path that are not keys in them, such as pydantic's union
            tags, are left out.
        locate: says where a key path is.
    """
    problems = []
    for line in error.errors(include_url=False):
        context = line.get("ctx", {})
        path = _key_path(line["loc"], raw, keep_last=line["type"] != _CONFLICT)
        problems.append(Problem(locate(path), context.get("message", line["msg"]), context.get("remedy", "")))
    return list(dict.fromkeys(problems))


def unknown_keys(error: ValidationError, raw: object) -> Iterator[tuple[KeyPath, str]]:
    """The path and the remedy of each unknown key among what validation of `raw` raised."""
    for line in error.errors(include_url=False):
        if line["type"] == UNKNOWN_KEY:
            yield _key_path(line["loc"], raw, keep_last=True), line["ctx"]["remedy"]


def _key_path(loc: Sequence[str | int], raw: object, *, keep_last: bool) -> KeyPath:
    path: list[str | int] = []
    for position, part in enumerate(loc):
        if part == _OF_KEY:
            break
        if isinstance(raw, Settings):
            raw = {key: getattr(raw, key) for key in type(raw).model_fields}
        if isinstance(raw, list | tuple):
            raw = dict(enumerate(raw))
        if isinstance(raw, Mapping) and part in raw:
            raw = raw[part]
        elif not (keep_last and position == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _line(loc: KeyPath, kind: str, message: str, remedy: str, value: object) -> InitErrorDetails:
    custom = PydanticCustomError(kind, "{message}", {"message": message, "remedy": remedy})
    return InitErrorDetails(type=custom, loc=loc, input=value)


def _only_looks_short(line: Mapping[str, Any]) -> bool:
    """Whether a list counts as too short only because some of its items are wrong, which is said for itself."""
    return line["type"] == "too_short" and len(line["input"]) >= line.get("ctx", {}).get("min_length", math.inf)


def _explained(cls: type[Settings], line: dict[str, Any]) -> InitErrorDetails:
    """One of pydantic's errors, in our words."""
    kind, loc, value, context = line["type"], line["loc"], line["input"], line.get("ctx", {})
    if "message" in context:
        return _line(loc, kind, context["message"], context["remedy"], value)
    if kind == "extra_forbidden":
        key = str(loc[-1])
        remedy = f"write {cls.older_keys[key]}" if key in cls.older_keys else nearest(key, cls.key_names())
        return _line(loc, UNKNOWN_KEY, f"unknown key {shown(key)}", remedy, value)
    if kind == "missing":
        field = next(f for n, f in cls.model_fields.items() if loc[-1] in (n, f.alias))
        return _line(loc, kind, f"the key '{loc[-1]}' is missing", (field.description or "").partition("\n")[0], value)
    if kind == UNKNOWN_TYPE:
        name, choices = Given(value).values.get("type"), context["choices"].split()
        message = "the key 'type' is missing" if name is None else f"there is no {shown(str(name))}"
        if str(name) in context["elsewhere"].split():
            return _line((*loc, "type"), kind, f"{name} can't stand here", f"choose from {', '.join(choices)}", value)
        meant, names = closest(str(name or ""), choices), ", ".join(choices)
        remedy = f"did you mean '{meant}'? There are {names}" if meant else f"choose from {names}"
        if str(name) in nni.NAMES:
            remedy = "; ".join(filter(None, (nni.NAMES[str(name)], f"there are {names}")))
        return _line((*loc, "type"), kind, message, remedy, value)
    if kind == "too_short":
        return _line(loc, kind, "it is empty", f"at least {context['min_length']} needed", value)
    if kind == "literal_error":
        return _line(loc, kind, f"got {shown(value)}", f"should be {context['expected']}", value)
    wanted = _CONTAINERS.get(kind)
    if wanted:
        return _line(loc, kind, f"got {shown(value)}", f"should be {wanted}", value)
    return _line(loc, kind, f"got {shown(value)}: {line['msg']}", "", value)


_CONTAINERS = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "string_type": "a text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
}
