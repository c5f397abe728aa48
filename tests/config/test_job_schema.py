"""The JSON schema takes what the loader takes, and refuses what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest

from raycomp.config import job_schema, sweep_schema

JOB: dict[str, Any] = {
    "name": "digits",
    "task": {"entrypoint": "task.py:Digits", "arguments": {"width": 16}},
    "training": {"epochs": 3},
    "stages": [
        {
            "name": "fused",
            "training": {"steps": 3},
            "compressors": [
                {
                    "type": "AGPPruner",
                    "interval_steps": 4,
                    "total_times": 2,
                    "pruner": {
                        "type": "L1NormPruner",
                        "config_list": [
                            {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "target_settings": {"bias": {"align": {}}}}
                        ],
                    },
                },
                {"type": "DynamicLayerwiseDistiller", "config_list": [{"op_names": ["x"], "lambda": 0.5}]},
            ],
        }
    ],
    "int8": {"enabled": "auto", "reduce_range": False},
}


def errors(job: object) -> list[jsonschema.ValidationError]:
    return list(jsonschema.Draft202012Validator(job_schema()).iter_errors(job))


def test_the_schema_is_a_schema_and_plain_json() -> None:
    jsonschema.Draft202012Validator.check_schema(job_schema())
    assert json.loads(json.dumps(job_schema())) == job_schema()


def keys(schema: object, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property that a schema has anywhere, by its place."""
    if isinstance(schema, dict):
        properties = schema.get("properties", {})
        yield from ((f"{place}.{name}", value) for name, value in properties.items())
    inner = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    for name, value in inner:
        yield from keys(value, f"{place}.{name}")


@pytest.mark.parametrize("schema", [job_schema, sweep_schema])
def test_every_key_has_a_description(schema: Callable[[], dict[str, Any]]) -> None:
    found = dict(keys(schema()))
    assert len(found) > 10
    assert [place for place, value in found.items() if not value.get("description", "").strip()] == []


def test_it_takes_a_job() -> None:
    assert errors(JOB) == []


@pytest.mark.parametrize(
    "change",
    [
        {"trainning": {}},
        {"name": "my job"},
        {"training": {"epochs": 0}},
        {"training": {"epochs": 1, "precision": "fp16"}},
        {"stages": []},
        {"stages": [{"name": "a", "compressors": [{"type": "Unheard"}]}]},
        {"stages": [{"name": "a", "compressors": [{"config_list": [{"op_names": ["x"]}]}]}]},
        {"int8": {"enabled": "maybe"}},
        {"scaling": None},
    ],
)
def test_it_refuses(change: dict[str, Any]) -> None:
    assert errors({**JOB, **change})


def test_every_key_is_described_for_editors() -> None:
    schema = job_schema()
    for title, definition in {**schema["$defs"], "job": schema}.items():
        for key, described in definition.get("properties", {}).items():
            assert "description" in described or "$ref" in described or key in ("type", "config_list"), f"{title}.{key}"
