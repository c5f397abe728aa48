"""Changes single keys of a job's plain values."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from pydantic import ValidationError

from raycomp.config.base import unknown_keys
from raycomp.config.job import JobConfig
from raycomp.config.values import PATHS, KeyPath, format_path, parse_path, shown
from raycomp.errors import ConfigError, Problem


def set_key(mapping: Mapping[str, Any], key_path: str, value: Any) -> dict[str, Any]:
    """A copy of a job's plain values with one key set.

    Args:
        key_path: `stages.0.compressors.0.pruner.config_list.0.sparse_ratio`, or the same with brackets.

    Raises:
        ConfigError: a job has no such key.
    """
    path = parse_path(key_path)
    if not path:
        raise ConfigError([Problem(shown(key_path), "it is no path of keys", PATHS)])
    result = deepcopy(dict(mapping))
    holder: Any = result
    for position, part in enumerate(path):
        last = position == len(path) - 1
        part_of = format_path(path[: position + 1])
        if isinstance(part, int) and isinstance(holder, list):
            if part >= len(holder):
                raise ConfigError([Problem(key_path, f"{part_of} is not there", f"the list has {len(holder)} items")])
        elif isinstance(part, str) and isinstance(holder, dict):
            holder.setdefault(part, {})
        else:
            raise ConfigError([Problem(key_path, f"{part_of} is not there", _what_is(holder))])
        if last:
            holder[part] = value
        else:
            holder = holder[part]
    _refuse_unknown(result, path, key_path)
    return result


def _what_is(holder: Any) -> str:
    if isinstance(holder, list):
        return f"it is a list: a number below {len(holder)} comes here"
    return "it is a mapping: a key comes here" if isinstance(holder, dict) else f"there is {shown(holder)} already"


def _refuse_unknown(mapping: Mapping[str, Any], path: KeyPath, key_path: str) -> None:
    try:
        JobConfig.model_validate(mapping)
    except ValidationError as error:
        for unknown, remedy in unknown_keys(error, mapping):
            if unknown == path[: len(unknown)]:
                raise ConfigError([Problem(key_path, f"a job has no key {format_path(unknown)}", remedy)]) from None
