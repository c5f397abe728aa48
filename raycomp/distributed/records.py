"""Small JSON files about runs and sweeps."""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from raycomp.errors import ArtifactError
from raycomp.storage import Store

Record = TypeVar("Record")


def read_record(store: Store, name: str, adapter: TypeAdapter[Record]) -> Record | None:
    """What `write_record` wrote; None where there is nothing.

    Raises:
        ArtifactError: the file is damaged, or another raycomp's.
        StorageError: it can't be read.
    """
    if not store.exists(name):
        return None
    try:
        return adapter.validate_json(store.read_bytes(name))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise ArtifactError(f"it is damaged, or another raycomp's ({reason})", where=store.join(name).uri) from None


def write_record(store: Store, name: str, adapter: TypeAdapter[Record], record: Record) -> None:
    """Stores a record: afterwards the file holds all of it, or what it held before."""
    store.write_bytes(name, adapter.dump_json(record, indent=1))
