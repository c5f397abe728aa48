"""Errors of the user's own code, told as one error with its cause and its place."""

from __future__ import annotations

import re
import signal
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import get_worker_info

from raycomp.errors import RaycompError, TaskError

_LIBRARIES = tuple(
    str(Path(folder).resolve())
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), Path(__file__).parents[1])
)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_FRAME = re.compile(r'^  File "(.+)", line (\d+).*$', re.MULTILINE)
_CONSEQUENCES = "\nThe above exception was the direct cause"


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Runs the user's code within the block: what it raises becomes a TaskError that says `what` raised, and where.

    Args:
        what: the part of the task that runs: `Digits.train_data()`.

    Raises:
        TaskError: from any other exception, `sys.exit()` too; raycomp's own errors pass as they are, and so do
            interrupts, and the errors of a broken connection to another worker, which a forward pass meets where a
            batch norm or DDP speaks to it.
    """
    try:
        yield
    except RaycompError:
        raise
    except BaseException as error:
        if isinstance(error, GeneratorExit) or is_of_communication(error) or ends_the_process(error):
            raise
        cause, place = _elsewhere(error) or (_told(error), _place(error))
        raise TaskError(f"{what} raised {cause}", where=place) from error


def _told(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def ends_the_process(error: BaseException) -> bool:
    """Whether an error is an interrupt, or Ray's way to stop a worker, and not what the user's code raised by itself.

    Interrupts reach the main thread alone, and are plain ones where Python's own handler makes them, or code in C++.
    """
    if not isinstance(error, KeyboardInterrupt):
        return getattr(error, "is_ray_terminate", False)
    if type(error) is not KeyboardInterrupt:
        return True
    if threading.current_thread() is not threading.main_thread() or get_worker_info() is not None:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    by_hand = bool(frames) and not _is_library(frames[-1].filename)
    return not by_hand or signal.getsignal(signal.SIGINT) is signal.default_int_handler


def is_of_communication(error: BaseException) -> bool:
    """Whether an error is that of a broken connection to another worker."""
    # gloo raises plain RuntimeErrors; they begin with the place in its source.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _elsewhere(error: BaseException) -> tuple[str, str | None] | None:
    """Cause and place of an error in another process, of which Ray has no more than the text of its traceback."""
    text = _COLOURS.sub("", str(error))
    if not text.startswith("ray::"):
        return None
    first = text.partition(_CONSEQUENCES)[0].rstrip()
    frames = list(_FRAME.finditer(first))
    if not frames:
        return first.splitlines()[-1], None
    behind = first[frames[-1].end() :].splitlines()
    cause = [line for line in behind if line and not line.startswith(" ")]
    places = [f"{file}:{line}" for file, line in (frame.groups() for frame in frames) if not _is_library(file)]
    return "\n".join(cause) or behind[-1], places[-1] if places else None


def _place(error: BaseException) -> str | None:
    """File and line of the innermost frame that is neither raycomp's nor a library's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _is_library(filename: str) -> bool:
    return filename.startswith("<") or str(Path(filename).resolve()).startswith(_LIBRARIES)
