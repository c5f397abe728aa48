"""One driver at a time works on a run: it holds a lease in the run's storage, and shows there that it is alive."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pydantic import TypeAdapter

from raycomp.distributed.records import read_record, write_record
from raycomp.errors import ArtifactError, ClusterError, StorageError
from raycomp.storage import Store, open_store

_BEAT_S = 5.0
_SILENCE_S = 30.0
_LOOK_S = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Args:
        host: its machine.
        process: its id there.
        since: UTC time, ISO 8601.
        beats: grows while it is alive, so that nobody has to compare clocks.
        released: whether it has let go.
    """

    host: str
    process: int
    since: str
    beats: int = 0
    released: bool = False

    @property
    def is_dead(self) -> bool:
        """Whether it is known to be gone: it ran on this machine, and doesn't any more."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def __str__(self) -> str:
        age = datetime.now(UTC) - datetime.fromisoformat(self.since)
        return f"process {self.process} on {self.host}, for {int(age.total_seconds())} s"


_HOLDER = TypeAdapter(Holder)


class Lease:
    """A lease that this process holds.

    Each holder has a file of its own, numbered in turn, and of several that want to be the next one wins.

    Args:
        store: the folder of the lease.
        name: of this holder's file.
        holder: this process.
    """

    def __init__(self, store: Store, name: str, holder: Holder) -> None:
        self._store, self._name, self._holder = store, name, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="raycomp-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Comes before anything is stored that another holder would store, too.

        Raises:
            ClusterError: this process was silent for so long that another took the lease.
        """
        last = self._store.files()[-1]
        if last != self._name:
            raise ClusterError(
                f"{_holder(self._store, last)} has taken this run over, as this process gave no sign of life",
                where=self._store.uri,
            )

    def release(self) -> None:
        """Lets the next one begin at once."""
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):
            write_record(self._store, self._name, _HOLDER, replace(self._holder, released=True))

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            self._holder = replace(self._holder, beats=self._holder.beats + 1)
            with suppress(StorageError):
                write_record(self._store, self._name, _HOLDER, self._holder)


@contextmanager
def lease(place: Store, tell: Callable[[str], None]) -> Iterator[Lease]:
    """Within the block, this process holds the lease of what is stored at `place`.

    Args:
        place: a run's folder.
        tell: hears that a holder may be dead and is watched, and that the lease is taken over.

    Raises:
        ClusterError: another process holds it, and is alive.
    """
    # A patient store would keep a sign of life back for longer than others wait for it.
    held = _take(open_store(place.join("lease").uri), tell)
    try:
        yield held
    finally:
        held.release()


def _take(store: Store, tell: Callable[[str], None]) -> Lease:
    mine = Holder(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
    while True:
        names = store.files()
        if names:
            _await_end(store, names[-1], tell)
        name = f"{len(names):06}.json"
        if store.create_bytes(name, _HOLDER.dump_json(mine)):
            return Lease(store, name, mine)


def _await_end(store: Store, name: str, tell: Callable[[str], None]) -> None:
    """Returns once the holder has let go or is dead, which its silence shows where nothing else does."""
    first = _holder(store, name)
    if first is None or first.released or first.is_dead:
        return
    tell(f"this run is in the hands of {first}: waiting for a sign of life")
    for _ in range(round(_SILENCE_S / _LOOK_S)):
        time.sleep(_LOOK_S)
        now = _holder(store, name)
        if now is None or now.released:
            return
        if now != first:
            raise ClusterError(
                f"{first} works on this run",
                where=store.uri,
                remedy="wait for it or end it; without --resume another run begins",
            )
    tell(f"{first} gives no sign of life: its run is taken over")


def _holder(store: Store, name: str) -> Holder | None:
    """A holder; None where its file is damaged, so that nobody can claim to be it."""
    try:
        return read_record(store, name, _HOLDER)
    except ArtifactError:
        return None
