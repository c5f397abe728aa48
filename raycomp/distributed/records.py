"""Small JSON files about runs and sweeps, each with its own digest, so that damage is seen."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

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
        stored = json.loads(store.read_bytes(name))
        if stored["sha256"] != _digest(stored["record"]):
            raise ValueError("its content has another digest than it says")
        return adapter.validate_python(stored["record"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    raise ArtifactError(f"it is damaged, or another raycomp's ({reason})", where=store.join(name).uri)


def write_record(store: Store, name: str, adapter: TypeAdapter[Record], record: Record) -> None:
    """Stores a record: afterwards the file holds all of it, or what it held before."""
    store.write_bytes(name, record_bytes(adapter, record))


def record_bytes(adapter: TypeAdapter[Record], record: Record) -> bytes:
    """What a record's file holds."""
    value = adapter.dump_python(record, mode="json")
    return json.dumps({"sha256": _digest(value), "record": value}, indent=1).encode()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
