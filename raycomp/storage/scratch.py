"""Folders for files that must not outlive their process."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "raycomp-scratch-"
_held = set[Path]()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of this user alone, below the machine's temporary one, which is gone after the block.

    What processes left there that were killed is removed with it: a folder's owner holds a lock on it, which ends with
    the process.
    """
    _remove_abandoned()
    folder, lock = _locked_folder()
    _held.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _held.discard(folder)
        os.close(lock)
        _remove_abandoned()


def remove_held() -> None:
    """Removes the folders of blocks that this process is in, because it won't come to their ends."""
    for folder in tuple(_held):
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Another process may have taken the folder for an abandoned one in between.
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, lock
            os.close(lock)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
