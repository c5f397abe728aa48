"""The JSON schemas of job and sweep files, for editors."""

from __future__ import annotations

from typing import Any

from raycomp.config.base import Settings
from raycomp.config.job import JobConfig
from raycomp.config.sweep import SweepConfig


def sweep_schema() -> dict[str, Any]:
    """The same of a sweep file."""
    return _schema(SweepConfig, "raycomp sweep")


def job_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a job file, with a description of each key."""
    return _schema(JobConfig, "raycomp job")


def _schema(settings: type[Settings], title: str) -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **settings.model_json_schema(),
        "title": title,
    }
