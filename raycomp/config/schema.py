"""The job file's JSON schema, for editors."""

from __future__ import annotations

from typing import Any

from raycomp.config.job import JobConfig


def job_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a job file, with a description of each key."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobConfig.model_json_schema(),
        "title": "raycomp job",
    }
