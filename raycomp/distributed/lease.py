"""One driver at a time works on a run: it holds a lease in the run's storage, and shows there that it is alive."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, TypeAdapter

from raycomp.distributed.records import read_record, record_bytes, write_record
from raycomp.errors import ArtifactError, ClusterError, StorageError
from raycomp.storage import Store, open_store

_BEAT_S = 5.0
_SILENCE_S = 30.0
_LOOK_S = 1.0
_FILE = re.compile(r"\d{6,}\.json")


def _numbering() -> str:
    """What a process's number means something in: one start of one kernel, and of it the container's part."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {space.stat().st_ino}" if boot.exists() and space.exists() else ""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Args:
        host: its machine.
        process: its id there.
        since: when it began, by its own clock.
        numbering: where the id means this process; containers of one host number theirs anew.
        beats: grows while it is alive, so that nobody has to compare clocks.
        released: whether it has let go.
    """

    host: str
    process: int
    since: AwareDatetime
    numbering: str = ""
    beats: int = 0
    released: bool = False

    @classmethod
    def this_process(cls) -> Holder:
        """Who begins to hold one here and now."""
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).replace(microsecond=0), _numbering())

    @property
    def has_ended(self) -> bool:
        """Whether it has let go, or is known to be gone: it ran where this process runs, and doesn't any more."""
        if self.released or self.host != socket.gethostname() or self.numbering != _numbering():
            return self.released
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return False

    def __str__(self) -> str:
        age = int((datetime.now(UTC) - self.since).total_seconds())
        return f"process {self.process} on {self.host}, for {max(age, 0)} s"


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
        # A patient store would keep a sign of life back for longer than others wait for it.
        self._signs = open_store(store.uri)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="raycomp-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Comes before anything is stored that another holder would store, too.

        Raises:
            ClusterError: this process was silent for so long that another took the lease.
        """
        last = _last(self._store)
        if last is not None and last > self._name:
            raise ClusterError(
                f"{_named(_holder(self._store, last))} has taken this run over, as this process gave no sign of life",
                where=self._store.uri,
            )

    def release(self) -> None:
        """Lets the next one begin at once."""
        self._ended.set()
        self._thread.join()
        self._say(replace(self._holder, released=True))

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            self._holder = replace(self._holder, beats=self._holder.beats + 1)
            self._say(self._holder)

    def _say(self, holder: Holder) -> None:
        with suppress(StorageError):
            if _last(self._signs) is None:
                return  # the storage is away: it must not be made anew
            write_record(self._signs, self._name, _HOLDER, holder)


@contextmanager
def lease(place: Store, tell: Callable[[str], None]) -> Iterator[Lease]:
    """Within the block, this process holds the lease of what is stored at `place`.

    Args:
        place: a run's folder.
        tell: hears that a holder may be dead and is watched, and that the lease is taken over.

    Raises:
        ClusterError: another process holds it, and is alive.
    """
    held = _take(place.join("lease"), tell)
    try:
        yield held
    finally:
        held.release()


def _take(store: Store, tell: Callable[[str], None]) -> Lease:
    mine = Holder.this_process()
    while True:
        last = _last(store)
        if last is not None:
            _await_end(store, last, tell)
        name = "000000.json" if last is None else f"{int(last.removesuffix('.json')) + 1:06}.json"
        if store.create_bytes(name, record_bytes(_HOLDER, mine)):
            return Lease(store, name, mine)


def _last(store: Store) -> str | None:
    """The newest holder's file; what else lies in the folder (a file half written, an editor's) says nothing."""
    return max((name for name in store.files() if _FILE.fullmatch(name)), default=None)


def _await_end(store: Store, name: str, tell: Callable[[str], None]) -> None:
    """Returns once the holder has let go or is dead, which its silence shows where nothing else does."""
    first = _holder(store, name)
    if first is not None and first.has_ended:
        return
    tell(f"this run is in the hands of {_named(first)}: waiting for a sign of life")
    for _ in range(round(_SILENCE_S / _LOOK_S)):
        time.sleep(_LOOK_S)
        now = _holder(store, name)
        if now is not None and now.has_ended:
            return
        if now not in (None, first):
            raise ClusterError(
                f"{now} works on this run",
                where=store.uri,
                remedy="wait for it or end it; without --resume another run begins",
            )
    tell(f"{_named(first)} gives no sign of life: its run is taken over")


def _holder(store: Store, name: str) -> Holder | None:
    """A holder; None where its file is gone or damaged: one that is alive soon writes it anew."""
    try:
        return read_record(store, name, _HOLDER)
    except ArtifactError:
        return None


def _named(holder: Holder | None) -> str:
    return "a process whose file is damaged" if holder is None else str(holder)
