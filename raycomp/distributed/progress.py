"""Who hears of what a job does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console

from raycomp.errors import ConfigError, Problem, TaskError
from raycomp.pipeline.user_code import user_code
from raycomp.report import ProgressPrinter
from raycomp.results.progress import ProgressEvent


@runtime_checkable
class Progress(Protocol):
    """Who shows a run's progress."""

    def message(self, line: str) -> None:
        """A part of the run begins or ends."""

    def event(self, event: ProgressEvent) -> None:
        """News from training."""


class Silent:
    """Shows nothing."""

    def message(self, line: str) -> None:
        """Nothing."""

    def event(self, event: ProgressEvent) -> None:
        """Nothing."""


class _Given:
    """A listener or function: the first error of its own ends what it hears, and not the training.

    Args:
        progress: either of them.
    """

    def __init__(self, progress: Progress | Callable[[str | ProgressEvent], None]) -> None:
        self._message = progress.message if isinstance(progress, Progress) else progress
        self._event = progress.event if isinstance(progress, Progress) else progress
        self._hears = True

    def message(self, line: str) -> None:
        self._tell(self._message, line)

    def event(self, event: ProgressEvent) -> None:
        self._tell(self._event, event)

    def _tell(self, listener: Callable[..., None], news: str | ProgressEvent) -> None:
        if not self._hears:
            return
        try:
            with user_code("progress"):
                listener(news)
        except TaskError as error:
            self._hears = False
            warnings.warn(f"{error}; it hears no more of the job, which goes on", RuntimeWarning, stacklevel=2)


@contextmanager
def shown(progress: Progress | Callable[[str | ProgressEvent], None] | None) -> Iterator[Progress]:
    """Within the block, what `progress` stands for; None is the terminal or notebook, where there is one.

    Raises:
        ConfigError: it is nothing that can be told.
    """
    console = Console(stderr=True)
    if progress is None and (console.is_terminal or console.is_jupyter):
        with ProgressPrinter(console) as printer:
            yield printer
    elif progress is None:
        yield Silent()
    elif isinstance(progress, Progress) or callable(progress):
        yield _Given(progress)
    else:
        remedy = "give a function of lines and ProgressEvents, or an object with message(line) and event(event)"
        raise ConfigError([Problem("progress", f"got an object of type {type(progress).__name__}", remedy)])
