"""Ctrl-C and SIGTERM end a run in order: what Ray does with them otherwise is to hang on, or to print its C++ stack."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process.

    Args:
        signum: which.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM raises Interrupted; a second one ends the process at once.

    In other threads than the main one, which Python lets hear of no signal, nothing happens.
    """
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        raise Interrupted(number)

    with same_signals():
        if _hears_signals():
            for number in _SIGNALS:
                signal.signal(number, handle)
        try:
            yield
        except KeyboardInterrupt:
            # Where Ray waits in C++, it makes a plain one of ours.
            raise Interrupted(seen[0] if seen else signal.SIGINT) from None


@contextmanager
def same_signals() -> Iterator[None]:
    """After the block, signals do what they did before it; Ray takes SIGTERM for itself when it is connected."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        if _hears_signals():
            for number, handler in before.items():
                signal.signal(number, handler)


def _hears_signals() -> bool:
    return threading.current_thread() is threading.main_thread()
