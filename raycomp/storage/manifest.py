"""What an artifact says about itself: its files with their hashes, where it comes from, and its figures."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue, ValidationError
from pydantic_core import from_json

from raycomp.config.base import Settings, problems_of
from raycomp.config.values import CountOrZero, Slug, Text, expects, format_path
from raycomp.errors import ArtifactError
from raycomp.storage.documents import ManyNamed, check_extent

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_MOST_PROBLEMS = 5
_MOST_UNKNOWN = 1000
_MOST_FILES = 1000
_DAMAGED = "it is damaged, or nothing that raycomp published"


def safe_name(name: str) -> str:
    """A file's name that stays inside the folder it is joined to, on any system.

    Raises:
        ValueError: it does not.
    """
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or re.search(r'[\\:*?"<>|\x00-\x1f\x7f]', name):
        raise ValueError(f"'{name}' is not a plain relative file name")
    return name


_FileName = Annotated[Text, AfterValidator(safe_name), expects("a relative file name without '..'")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), expects("a sha256 in hex")]


class FileRecord(Settings):
    """One file of an artifact."""

    bytes: CountOrZero
    sha256: _Digest
    path: _FileName
    """Where it is below the artifact's place; its name, unless another publication was cut short there."""


class Manifest(Settings):
    """The file that makes an artifact: written last, so that where it is, everything is."""

    format_version: CountOrZero = FORMAT_VERSION
    id: Slug
    job: Text
    run: Text
    created: Text
    """UTC, ISO 8601."""
    files: dict[_FileName, FileRecord]
    lineage: dict[str, JsonValue] = Field(default_factory=dict)
    """What it was made from."""
    versions: ManyNamed[str] = Field(default_factory=dict)
    """The versions of the packages that made it."""
    figures: dict[str, JsonValue] = Field(default_factory=dict)
    """What was measured."""

    def to_json(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Reads a manifest.

        Raises:
            ArtifactError: it is not one, or this raycomp is too old for it.
        """
        check_extent(data, "a manifest", where)
        try:
            raw: Any = from_json(data)
        except ValueError as error:
            raise ArtifactError(f"the manifest is not JSON: {error}", where=where, remedy=_DAMAGED) from None
        named = raw.get("files") if isinstance(raw, dict) else None
        if isinstance(named, dict) and len(named) > _MOST_FILES:
            raise ArtifactError(f"the manifest names {len(named):,} files", where=where, remedy=_DAMAGED)
        if (unknown := _unknown_keys(raw)) > _MOST_UNKNOWN:
            raise ArtifactError(f"the manifest has {unknown:,} unknown keys", where=where, remedy=_DAMAGED)
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ArtifactError(
                f"the artifact has format {version}, and this raycomp reads up to {FORMAT_VERSION}",
                where=where,
                remedy="update raycomp",
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            problems = problems_of(error, raw, format_path)
            told = "; ".join(map(str, problems[:_MOST_PROBLEMS])) + (" …" if len(problems) > _MOST_PROBLEMS else "")
            raise ArtifactError(f"the manifest is not right: {told}", where=where, remedy=_DAMAGED) from None


def _unknown_keys(raw: object) -> int:
    """Of a manifest and its files' records: each one that is told takes some kB."""
    if not isinstance(raw, dict):
        return 0
    named = raw.get("files")
    records = [each for each in named.values() if isinstance(each, dict)] if isinstance(named, dict) else []
    known = Manifest.model_fields, FileRecord.model_fields
    return sum(key not in known[0] for key in raw) + sum(key not in known[1] for each in records for key in each)


def local_files(names: list[PurePosixPath]) -> list[str]:
    """The names of an artifact's files, checked.

    Raises:
        ArtifactError: a name that no artifact can hold.
    """
    try:
        checked = [safe_name(name.as_posix()) for name in sorted(names)]
    except ValueError as error:
        raise ArtifactError(str(error)) from None
    if MANIFEST in checked:
        raise ArtifactError(f"{MANIFEST} is written by the publication itself", remedy="leave it out of the folder")
    return checked
