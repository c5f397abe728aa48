"""Artifacts: published whole or not at all, never overwritten, verified when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from raycomp.config import nearest
from raycomp.errors import ArtifactError, ConfigError, RaycompError, StorageError, visible
from raycomp.storage.documents import LONGEST_DOCUMENT
from raycomp.storage.explain import explained
from raycomp.storage.filesystem import Store, open_store
from raycomp.storage.manifest import MANIFEST, FileRecord, Manifest, local_files
from raycomp.storage.upload import upload_file

_CLAIM = ".publishing"
_ATTEMPT = "attempt-"
_LONGEST_CAUSE = 300
_DAMAGED = "it is damaged, or nothing that raycomp published"


@dataclass(frozen=True)
class ArtifactRef:
    """A published artifact: its id, and the URI that `open_artifact` takes."""

    id: str
    uri: str


@dataclass(frozen=True)
class Artifact:
    """A published artifact, to read from."""

    store: Store
    manifest: Manifest

    @property
    def uri(self) -> str:
        return self.store.uri

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its files, sorted."""
        return tuple(sorted(self.manifest.files))

    def fetch(self, name: str, folder: Path) -> Path:
        """Copies a file into a local folder, verified.

        Returns:
            The copy; it is there only if size and sha256 are the manifest's.

        Raises:
            ArtifactError: there is no such file, or it is not what the manifest says.
        """
        record = self._record(name)
        target = folder / name
        with explained(str(target)):
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise ArtifactError(f"'{name}' would be written outside of {folder}", where=self.uri)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                with temporary.open("xb") as stream:
                    for chunk in self._verified(name, record):
                        stream.write(chunk)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        return target

    def read_bytes(self, name: str) -> bytes:
        """A file's content, verified as in `fetch`."""
        return b"".join(self._verified(name, self._record(name)))

    def _record(self, name: str) -> FileRecord:
        record = self.manifest.files.get(name)
        if record is None:
            raise ArtifactError(f"it holds no '{name}'", where=self.uri, remedy=nearest(name, self.names))
        return record

    def _verified(self, name: str, record: FileRecord) -> Iterator[bytes]:
        """The file's pieces; raises behind the last one if they are not what was published."""
        digest, size = hashlib.sha256(), 0
        actual = self.store.size(record.path)
        if actual != record.bytes:
            found = "it is missing" if actual is None else f"it has {actual} bytes instead of {record.bytes}"
            raise ArtifactError(f"'{name}' is not what was published: {found}", where=self.uri)
        for chunk in self.store.read_chunks(record.path):
            digest.update(chunk)
            size += len(chunk)
            yield chunk
        if size != record.bytes or digest.hexdigest() != record.sha256:
            raise ArtifactError(f"'{name}' is not what was published: its sha256 differs", where=self.uri)


@contextlib.contextmanager
def understood(where: str, folder: Path | None = None) -> Iterator[None]:
    """Turns whatever the block makes of an artifact's content into one error about `where`.

    Args:
        where: the artifact, or a file of it.
        folder: where a copy lies that errors name instead.
    """
    try:
        yield
    except RaycompError as error:
        place = error.where or where
        if folder is not None and type(error) is not StorageError:  # which is about the copy's own disk
            place = place.replace(str(folder), where)
        error.where = place if where in place else f"{where}: {place}"
        if error.remedy is None and type(error) is not StorageError:
            error.remedy = _DAMAGED
        _shorten(error)
        raise
    except Exception as error:
        cause = next(iter(str(error).splitlines()), "")
        told = ArtifactError(
            f"it can't be used: {type(error).__name__}: {cause[:_LONGEST_CAUSE]}", where=where, remedy=_DAMAGED
        )
        told.__cause__ = error
        _shorten(told)
        raise told from told.__cause__


def _shorten(error: BaseException | None) -> None:
    """Takes causes by others whose texts would steer the terminal that a traceback is printed on from an error."""
    while error is not None:
        below = error.__cause__ or error.__context__
        if below is not None and not isinstance(below, RaycompError) and visible(str(below), lines=True) != str(below):
            below = None
            error.__cause__ = None  # which hides the context, too
        error = below


def open_artifact(uri: str | os.PathLike[str], endpoint: str | None = None, region: str | None = None) -> Artifact:
    """The artifact at a place, its manifest read; see `open_store` for the arguments.

    Raises:
        ArtifactError: there is none, or its manifest is not right.
        StorageError: the place can't be read.
    """
    store = open_store(uri, endpoint, region)
    if not store.exists(MANIFEST):
        inside = [name for name in store.folders() if store.join(name).exists(MANIFEST)][:8]
        hint = f"artifacts below it: {', '.join(inside)}" if inside else "is the URI right, and did the job end?"
        raise ArtifactError("there is no artifact", where=store.uri, remedy=hint)
    if (store.size(MANIFEST) or 0) > LONGEST_DOCUMENT:
        raise ArtifactError(
            f"its {MANIFEST} is longer than {LONGEST_DOCUMENT:,} bytes", where=store.uri, remedy=_DAMAGED
        )
    return Artifact(store, Manifest.from_json(store.read_bytes(MANIFEST), store.uri))


def artifact_uris(uri: str | os.PathLike[str]) -> tuple[str, ...]:
    """The URIs of the artifacts of a job's or sweep's folder, of all jobs of a storage, or of one that is itself there.

    Raises:
        StorageError: the place can't be read.
    """
    store = open_store(uri)
    jobs = [
        each.join(name) for each in (store, store.join("jobs")) for name in each.folders()
    ]  # a sweep's have a folder
    places = [store, *(job.join("artifacts") for job in (store, *jobs))]
    found = [store, *(place.join(name) for place in places for name in place.folders())]
    return tuple(sorted({each.uri for each in found if each.exists(MANIFEST)}))


def publish(store: Store, artifact_id: str, local_dir: Path, manifest_fields: Mapping[str, Any]) -> ArtifactRef:
    """Publishes the files of a local folder as an artifact. It is there once its manifest is, which is written last.

    Of several that publish the same id one wins. Who comes second, or after one that was cut short, writes into a
    folder of its own, so that no file of a published artifact is ever overwritten.

    Args:
        store: where artifacts are; this one comes into the folder of its id.
        artifact_id: its name.
        local_dir: its files.
        manifest_fields: the manifest's job, run, lineage, versions and figures.

    Raises:
        ArtifactError: an artifact of this id exists, or the folder or the fields are not right.
        StorageError: the place can't be written.
    """
    with explained(str(local_dir)):
        found = [path.relative_to(local_dir) for path in local_dir.rglob("*") if path.is_file()]
    names = local_files([PurePosixPath(path) for path in found])
    if not names:
        raise ArtifactError("there are no files to publish", where=str(local_dir))
    _manifest(artifact_id, {}, manifest_fields)
    destination = store.join(artifact_id)
    attempt = f"{_ATTEMPT}{uuid.uuid4().hex}"
    alone = _claimed(destination, attempt)
    paths = {name: name if alone else f"{attempt}/{name}" for name in names}
    # Looked at behind the claim: a winner takes its claim away only when its manifest is there.
    if destination.exists(MANIFEST):
        _withdraw(destination, attempt, [_CLAIM] if alone else [])
        raise _taken(destination)
    try:
        files = {name: _record(local_dir / name, destination, path) for name, path in paths.items()}
    except StorageError:
        _withdraw(destination, attempt, paths.values())
        # A winner tidies up what others are still writing.
        if destination.exists(MANIFEST):
            raise _taken(destination) from None
        raise
    if not _seal(destination, _manifest(artifact_id, files, manifest_fields).to_json()):
        _withdraw(destination, attempt, [*paths.values(), *([_CLAIM] if alone else [])])
        raise _taken(destination)
    # By name: to list what others are just deleting may fail.
    with contextlib.suppress(StorageError):
        destination.delete(_CLAIM)
    _tidy(destination, {MANIFEST, *paths.values()})
    return ArtifactRef(artifact_id, destination.uri)


def _claimed(destination: Store, attempt: str) -> bool:
    """Whether nobody else is publishing here."""
    try:
        return destination.create_bytes(_CLAIM, attempt.encode())
    except StorageError:
        # A winner tidies up what others are still writing.
        if destination.exists(MANIFEST):
            raise _taken(destination) from None
        raise


def _manifest(artifact_id: str, files: Mapping[str, FileRecord], fields: Mapping[str, Any]) -> Manifest:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return Manifest(**{"created": created, **fields, "id": artifact_id, "files": dict(files)})
    except ConfigError as error:
        raise ArtifactError(f"the manifest would not be right: {error}") from None


def _record(file: Path, destination: Store, path: str) -> FileRecord:
    """Uploads a file."""
    uploaded = upload_file(file, destination, path)
    return FileRecord(bytes=uploaded.bytes, sha256=uploaded.sha256, path=path)


def _seal(destination: Store, manifest: bytes) -> bool:
    """Writes the manifest unless there is one; whether it is ours that is there."""
    try:
        return destination.create_bytes(MANIFEST, manifest)
    except StorageError:
        # The files stay where they are: a write in doubt may yet arrive.
        if not destination.exists(MANIFEST):
            raise
        return destination.read_bytes(MANIFEST) == manifest


def _withdraw(destination: Store, attempt: str, paths: Iterable[str]) -> None:
    """Deletes what this publication wrote, and nothing of others. It costs room alone, so that failing is no error."""
    for path in paths:
        with contextlib.suppress(StorageError):
            destination.delete(path)
    with contextlib.suppress(StorageError):
        destination.delete_dir(attempt)


def _tidy(destination: Store, kept: set[str]) -> None:
    """Deletes what others wrote, who can't win any more. It costs room alone, so that failing is no error."""
    with contextlib.suppress(StorageError):
        for path in sorted({*destination.files()} - kept):
            with contextlib.suppress(StorageError):
                destination.delete(path)
        for folder in destination.folders():
            if folder.startswith(_ATTEMPT) and not any(path.startswith(f"{folder}/") for path in kept):
                destination.delete_dir(folder)


def _taken(destination: Store) -> ArtifactError:
    return ArtifactError(
        "an artifact of this id is already there, and is never overwritten",
        where=destination.uri,
        remedy="publish under another id",
    )
