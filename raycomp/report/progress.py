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

from raycomp.report import text
from raycomp.results.progress import ProgressEvent


class ProgressPrinter:
    """Shows ProgressEvents and messages as they come.

    On a terminal the last event stands as a live bar below the messages. Elsewhere an event is printed when its stage
    or epoch is new, when it brings metrics, when its stage ends, and otherwise every `every_s` seconds.

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
        """Prints a line that stays: a part of the run begins or ends."""
        self._console.print(Text(text.visible(line, lines=True)), soft_wrap=True)

    def event(self, event: ProgressEvent) -> None:
        """Takes the news from training."""
        if self._live is not None:
            if _ends(event):
                self._live.update(Text(""))
                self.message(event_line(event))
            else:
                self._live.update(_live_lines(event))
        elif self._is_due(event):
            self.message(event_line(event))
            self._printed_at = self._clock()
        self._last = event

    def _is_due(self, event: ProgressEvent) -> bool:
        last = self._last
        if last is None or (event.stage, event.epoch) != (last.stage, last.epoch):
            return True
        if event.metrics or _ends(event):
            return True
        return self._clock() - self._printed_at >= self._every_s


def event_line(event: ProgressEvent) -> str:
    """In one line: `stage fused  epoch 2/5  step 40/100  loss 0.31  accuracy 0.97  sparsity 25.0 %  2 workers …`."""
    parts = [f"stage {event.stage}", f"epoch {event.epoch}/{event.epochs}", f"step {event.step}/{event.steps}"]
    return "  ".join(parts + _figures(event))


def _figures(event: ProgressEvent) -> list[str]:
    workers = f"{event.workers} worker" + ("s" if event.workers != 1 else "")
    metrics = [f"{name} {text.number(value)}" for name, value in event.metrics.items()]
    sparsity = f"sparsity {text.percent(event.sparsity)}"
    loss = [] if event.loss is None else [f"loss {text.number(event.loss)}"]
    return [*loss, *metrics, sparsity, workers, text.seconds(event.elapsed_s)]


def _live_lines(event: ProgressEvent) -> RenderableType:
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(event.stage, style="bold"),
        ProgressBar(total=max(event.steps, 1), completed=event.step, width=28),
        Text(f"epoch {event.epoch}/{event.epochs}  step {event.step}/{event.steps}"),
    )
    return Group(bar, Text("  ".join(_figures(event)), style="dim"))


def _ends(event: ProgressEvent) -> bool:
    return event.step >= event.steps
