"""Ctrl-C and SIGTERM end a run in order: what Ray does with them otherwise is to hang on, or to print its C++ stack.

It imports little, so that a command hears of signals before anything slow is imported.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_S = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_heard: list[int] = []
"""The signals since the outermost block began; they are the process's, as signals are."""
_holding: list[bool] = []
"""One for each block within which a first signal is only noted."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process.

    Args:
        signum: which.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum
        self.told = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM raises Interrupted; a second one ends the process at once, and
    leaves no temporary folder of it.

    Blocks within it, and in other threads than the main one, which Python lets hear of no signal, change nothing.
    """
    if not _hears_signals() or signal.getsignal(signal.SIGTERM) is _handle:
        yield
        return
    _heard.clear()
    with same_signals(), _nowhere_lost():
        for number in _SIGNALS:
            signal.signal(number, _handle)
        try:
            yield
        except KeyboardInterrupt as error:
            raise _ours(error) from None
        finally:
            _heard.clear()


@contextmanager
def told(tell: Callable[[str], None], state: Callable[[], str], how: str) -> Iterator[None]:
    """Tells of an interrupt as soon as it leaves the block, unless a block within this one has told already.

    Args:
        tell: hears the line.
        state: gives what is saved.
        how: the way to go on.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        interrupted = _ours(error)
        if not interrupted.told:
            interrupted.told = True
            tell(f"interrupted: {state()}; to go on: {how}")
        raise interrupted from None


def raise_if_interrupted() -> None:
    """Raises what was heard before, for which some code of a library's has had no ear."""
    if _heard and _hears_signals():
        raise Interrupted(_heard[0])


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block, a first signal is only noted; it raises at the block's end. For what mustn't stop halfway."""
    if not _hears_signals():
        yield
        return
    _holding.append(True)
    try:
        yield
    finally:
        _holding.pop()
    raise_if_interrupted()


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


@contextmanager
def _nowhere_lost() -> Iterator[None]:
    """Within the block, an interrupt is raised again where Python has dropped it: in a finalizer, as imports have."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Interrupted):
            # This hook is itself where nothing can be raised.
            threading.Timer(_AGAIN_S, _raise_again, [dropped.exc_value.signum]).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _raise_again(number: int) -> None:
    _heard.clear()
    _thread.interrupt_main(signal.Signals(number))


def _handle(number: int, frame: FrameType | None) -> None:
    if not _heard:
        _heard.append(number)
        if _holding:
            return
        raise Interrupted(number)
    try:
        from raycomp.storage.scratch import remove_held

        remove_held()
    finally:
        os._exit(128 + number)


def _ours(error: KeyboardInterrupt) -> Interrupted:
    """Where Ray waits in C++, it makes a plain one of ours."""
    return error if isinstance(error, Interrupted) else Interrupted(_heard[0] if _heard else signal.SIGINT)


def _hears_signals() -> bool:
    return threading.current_thread() is threading.main_thread()
