"""Who hears of what a job does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rich.console import Console

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


@dataclass(frozen=True)
class _Told:
    """A function that hears all news."""

    tell: Callable[[str | ProgressEvent], None]

    def message(self, line: str) -> None:
        self.tell(line)

    def event(self, event: ProgressEvent) -> None:
        self.tell(event)


@contextmanager
def shown(progress: Progress | Callable[[str | ProgressEvent], None] | None) -> Iterator[Progress]:
    """Within the block, what `progress` stands for; None is the terminal or notebook, where there is one."""
    console = Console(stderr=True)
    if progress is None and (console.is_terminal or console.is_jupyter):
        with ProgressPrinter(console) as printer:
            yield printer
    elif progress is None:
        yield Silent()
    else:
        yield progress if isinstance(progress, Progress) else _Told(progress)
