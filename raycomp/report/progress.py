"""Progress of a run: one live line on a terminal, occasional plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raycomp.errors import visible
from raycomp.report import text
from raycomp.results.progress import ProgressEvent

_LEAST_S = 1.0


class ProgressPrinter:
    """Shows ProgressEvents and messages as they come.

    On a terminal the last event stands as a live bar below the messages. Elsewhere an event is printed when its stage
    is new, when its stage ends, when its epoch is new or it brings metrics, but then not twice within a second, and
    otherwise every `every_s` seconds.

    Args:
        console: where to print; default standard error, so that a command's output stays its own.
        every_s: least seconds between two plain lines of one epoch.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        every_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._every_s = every_s
        self._clock = clock
        self._live: Live | None = None
        self._last: ProgressEvent | None = None
        self._printed_at = float("-inf")
        self._first: ProgressEvent | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def message(self, line: str) -> None:
        """Prints a line that stays: a part of the run begins or ends, or workers were replaced."""
        self._first = None  # the pace is that of what comes now, without the time in between
        self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(Text(visible(line, lines=True)), soft_wrap=True)

    def event(self, event: ProgressEvent) -> None:
        """Takes the news from training."""
        last = self._last
        if self._first is None or last is None or event.stage != last.stage or event.step < last.step:
            self._first = event
        left = _left_s(self._first, event)
        if self._live is not None:
            if _ends(event):
                self._live.update(Text(""))
                self._print(event_line(event, left))
            else:
                self._live.update(_live_lines(event, left))
        elif self._is_due(event):
            self._print(event_line(event, left))
            self._printed_at = self._clock()
        self._last = event

    def _is_due(self, event: ProgressEvent) -> bool:
        last = self._last
        if last is None or event.stage != last.stage or _ends(event):
            return True
        is_news = bool(event.metrics) or event.epoch != last.epoch
        return self._clock() - self._printed_at >= (_LEAST_S if is_news else self._every_s)


def _left_s(first: ProgressEvent, event: ProgressEvent) -> float | None:
    """Seconds until the stage's training ends, at the pace since its first event, or since workers were replaced."""
    done = event.step - first.step
    return (event.elapsed_s - first.elapsed_s) / done * (event.steps - event.step) if done > 0 else None


def event_line(event: ProgressEvent, left_s: float | None = None) -> str:
    """In one line: `stage fused  epoch 2/5  step 40/100  loss 0.31  accuracy 0.97  sparsity 25.0 %  2 workers …`."""
    return "  ".join([f"stage {event.stage}", *_position(event), *_figures(event, left_s)])


def _position(event: ProgressEvent) -> list[str]:
    """Where training stands; a stage that only calibrates has no steps."""
    if not event.steps:
        return ["without training"]
    return [f"epoch {event.epoch}/{event.epochs}", f"step {event.step}/{event.steps}"]


def _figures(event: ProgressEvent, left_s: float | None) -> list[str]:
    metrics = [f"{name} {text.number(value)}" for name, value in event.metrics.items()]
    sparsity = f"sparsity {text.percent(event.sparsity)}"
    loss = [] if event.loss is None else [f"loss {text.number(event.loss)}"]
    rate = [] if event.learning_rate is None else [f"lr {text.number(event.learning_rate)}"]
    left = [f"{text.seconds(left_s)} left"] if left_s else []
    return [*loss, *metrics, *rate, sparsity, text.workers(event.workers), text.seconds(event.elapsed_s), *left]


def _live_lines(event: ProgressEvent, left_s: float | None) -> RenderableType:
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(event.stage, style="bold"),
        ProgressBar(total=max(event.steps, 1), completed=event.step, width=28),
        Text("  ".join(_position(event))),
    )
    return Group(bar, Text("  ".join(_figures(event, left_s)), style="dim"))


def _ends(event: ProgressEvent) -> bool:
    return event.step >= event.steps
