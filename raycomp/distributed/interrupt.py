"""Ctrl-C and SIGTERM end a run in order: what Ray does with them otherwise is to hang on, or to print its C++ stack."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
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
def interruptible() -> Iterator[Callable[[], None]]:
    """Within the block, the first SIGINT or SIGTERM raises Interrupted; a second one ends the process at once.

    It gives a function that takes the signals back from Ray, which takes them for itself when it is connected. In other
    threads than the main one, which Python lets hear of no signal, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        raise Interrupted(number)

    def arm() -> None:
        for number in _SIGNALS:
            signal.signal(number, handle)

    arm()
    try:
        yield arm
    except KeyboardInterrupt:
        # Where Ray waits in C++, it makes a plain one of ours.
        raise Interrupted(seen[0] if seen else signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
