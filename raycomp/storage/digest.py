"""The digests by which damage to a file is seen."""

from __future__ import annotations

import hashlib
from pathlib import Path

from raycomp.storage.explain import explained


def file_digest(path: Path) -> str:
    """A file's sha256, in hex, read piece by piece.

    Raises:
        StorageError: it can't be read.
    """
    with explained(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
