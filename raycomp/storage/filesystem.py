"""A place that holds files: a local folder, or a prefix in object storage."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from raycomp.config import StorageConfig
from raycomp.errors import ConfigError, StorageError
from raycomp.storage import s3
from raycomp.storage.explain import explained

CHUNK_BYTES = 4 * 1024 * 1024
_PATIENT_ATTEMPTS = 9
_PROBE_ATTEMPTS = 2
_PROBE_TIMEOUT_S = 4


@dataclass(frozen=True)
class Store:
    """A folder or prefix, and what can be done with the files below it. Names are relative, with slashes.

    Pickled, it holds no credentials: it is opened anew with those of the other process.

    Args:
        filesystem: Arrow's file system.
        path: the place in it.
        uri: the place as a URI or path that `open_store` takes by itself, endpoint and region included.
    """

    filesystem: fs.FileSystem
    path: str
    uri: str

    def __reduce__(self) -> tuple[object, ...]:
        attempts = self.filesystem.attempts if isinstance(self.filesystem, s3.RetryingS3) else None
        return _reopened, (self.uri, attempts)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def join(self, *parts: str) -> Store:
        """The place below this one."""
        below = "/".join(part.strip("/") for part in parts if part.strip("/"))
        if not below:
            return self
        place, mark, query = self.uri.partition("?") if not self.is_local else (self.uri, "", "")
        return replace(self, path=f"{self.path}/{below}", uri=f"{place.rstrip('/')}/{below}{mark}{query}")

    def read_bytes(self, name: str) -> bytes:
        return b"".join(self.read_chunks(name))

    def read_chunks(self, name: str) -> Iterator[bytes]:
        """The file's bytes, a few MB at a time."""
        with explained(self._where(name)), self.filesystem.open_input_stream(self._path(name)) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file: afterwards it holds all of `data`, or what it held before."""
        self.write_chunks(name, (data,))

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file in pieces. A local file appears once it is whole; an object too, unless `chunks` raises."""
        with explained(self._where(name)):
            if self.is_local:
                with _beside(Path(self._path(name))) as temporary:
                    _write_local(temporary, chunks)
                    temporary.replace(self._path(name))
                return
            with self.filesystem.open_output_stream(self._path(name)) as stream:
                for chunk in chunks:
                    stream.write(chunk)

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Writes a file unless it exists; of several that try at once, one wins.

        A store that takes no conditional write, or credentials that are a role's, leave a gap between look and write.

        Returns:
            Whether the file was written.
        """
        with explained(self._where(name)):
            if self.is_local:
                return _create_local(Path(self._path(name)), data)
            if isinstance(self.filesystem, s3.RetryingS3) and s3.can_sign():
                return self._put_if_absent(self.filesystem, name, data)
        if self.exists(name):
            return False
        self.write_bytes(name, data)
        return True

    def _put_if_absent(self, filesystem: s3.RetryingS3, name: str, data: bytes) -> bool:
        for attempt in range(filesystem.attempts):
            try:
                created = s3.put_if_absent(filesystem.location, self._path(name), data)
            except s3.InDoubtError:
                if attempt == filesystem.attempts - 1:
                    raise
                time.sleep(s3.delay_s(attempt))
                continue
            # What an attempt in doubt wrote is in the way of the next.
            return created or (attempt > 0 and self.read_bytes(name) == data)
        raise AssertionError("the last attempt returns or raises")

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """A file's bytes; None if there is no such file."""
        with explained(self._where(name)):
            info = self.filesystem.get_file_info(self._path(name))
        return info.size if info.type == fs.FileType.File else None

    def files(self) -> tuple[str, ...]:
        """The names of all files below this place, sorted."""
        return self._entries(fs.FileType.File, recursive=True)

    def folders(self) -> tuple[str, ...]:
        """The names of the folders right below this place, sorted."""
        return self._entries(fs.FileType.Directory, recursive=False)

    def delete(self, name: str) -> None:
        """Deletes a file that is there."""
        with explained(self._where(name)):
            self.filesystem.delete_file(self._path(name))

    def delete_dir(self, name: str = "") -> None:
        """Deletes a folder with all that it holds, if it is there."""
        path = self._path(name)
        with explained(self._where(name)):
            if self.filesystem.get_file_info(path).type == fs.FileType.Directory:
                self.filesystem.delete_dir(path)

    def patient(self) -> Store:
        """The same place, where a store that is away is waited for, a minute at most."""
        return self._trying(_PATIENT_ATTEMPTS)

    def check(self) -> None:
        """Writes and deletes a file, to see that the place can be used.

        Raises:
            StorageError: with the one cause: it can't be reached, the secret is wrong, the bucket is missing, ...
        """
        folder = self._trying(_PROBE_ATTEMPTS, _PROBE_TIMEOUT_S).join(f".probe-{uuid.uuid4().hex}")
        try:
            folder.write_bytes("probe", b"raycomp")
            folder.delete("probe")
            folder.delete_dir()
        except StorageError as error:
            raise StorageError(f"it can't be written: {error.message}", where=self.uri, remedy=error.remedy) from error

    def _trying(self, attempts: int, request_timeout_s: float = 30) -> Store:
        if not isinstance(self.filesystem, s3.RetryingS3):
            return self
        return replace(self, filesystem=s3.RetryingS3(self.filesystem.location, request_timeout_s, attempts))

    def _entries(self, kind: fs.FileType, *, recursive: bool) -> tuple[str, ...]:
        with explained(self.uri):
            try:
                found = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=recursive))
            except FileNotFoundError:
                return ()
        return tuple(sorted(info.path[len(self.path) :].strip("/") for info in found if info.type == kind))

    def _path(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _where(self, name: str) -> str:
        return self.join(name).uri


def open_store(uri: str | os.PathLike[str], endpoint: str | None = None, region: str | None = None) -> Store:
    """The place that a URI or a local path names. Credentials come from AWS_* environment variables or AWS's file.

    Args:
        uri: a folder, `s3://bucket/prefix`, also with pyarrow's `?endpoint_override=host:port&scheme=http&region=...`.
        endpoint: `http://host:port` of an S3 store that is not Amazon's; else from AWS_ENDPOINT_URL.
        region: the store's region; else from AWS_REGION.

    Raises:
        StorageError: the URI is not right, or there are no credentials for it.
    """
    uri = os.fspath(uri)
    try:
        StorageConfig(uri=uri, endpoint=endpoint, region=region)
    except ConfigError as error:
        first = error.problems[0]
        raise StorageError(first.message, where="storage", remedy=first.remedy or None) from None
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return _open_folder(Path(uri))
    if scheme == "file":
        return _open_folder(Path(unquote(urlsplit(uri).path)))
    if scheme == "s3":
        location = s3.locate(uri, endpoint, region)
        s3.require_credentials(location)
        with explained(location.uri):
            location = s3.with_region(location)
            return Store(s3.RetryingS3(location), location.path, location.uri)
    try:
        with explained(uri):
            filesystem, path = fs.FileSystem.from_uri(uri)
    except ValueError as error:
        raise StorageError(f"the URI is not right: {error}", where=uri) from None
    return Store(filesystem, path, uri)


def _reopened(uri: str, attempts: int | None) -> Store:
    store = open_store(uri)
    return store if attempts is None else store._trying(attempts)


def _open_folder(folder: Path) -> Store:
    path = str(folder.expanduser().absolute())
    return Store(fs.LocalFileSystem(), path, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name for a new file beside `path`, gone after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_local(path: Path, chunks: Iterable[bytes]) -> None:
    with path.open("xb") as stream:
        for chunk in chunks:
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _create_local(path: Path, data: bytes) -> bool:
    """A hard link to a whole file: it appears at once, and only where there is nothing yet."""
    with _beside(path) as temporary:
        _write_local(temporary, (data,))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True
