"""Files on their way into a store, piece by piece, so that none is ever whole in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raycomp.errors import StorageError
from raycomp.storage.explain import explained
from raycomp.storage.filesystem import CHUNK_BYTES, Store


@dataclass(frozen=True)
class Uploaded:
    """A file that arrived.

    Args:
        bytes: its size.
        sha256: its digest, in hex.
    """

    bytes: int
    sha256: str


def upload_file(file: Path, store: Store, name: str) -> Uploaded:
    """Writes a file into a store.

    Raises:
        StorageError: it can't be read or written, or another number of bytes arrived.
    """
    digest, size = hashlib.sha256(), 0

    def pieces() -> Iterator[bytes]:
        nonlocal size
        with explained(str(file)), file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                yield chunk

    store.write_chunks(name, pieces())
    stored = store.size(name)
    if stored != size:
        raise StorageError(f"{stored} of {size} bytes arrived", where=store.join(name).uri)
    return Uploaded(size, digest.hexdigest())
