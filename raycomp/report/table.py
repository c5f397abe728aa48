"""Tables for a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.jupyter import JupyterMixin
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from raycomp.errors import visible
from raycomp.report import text
from raycomp.report.comparison import Cell, comparison, load_line, rounding_texts, verification_texts
from raycomp.report.outcome import doubts, outcome
from raycomp.results.summary import RunSummary, TrialFigures

ARTIFACT_LABEL = "artifact  "
"""How the line begins that names a published artifact; whoever follows a job's log looks for it."""
_UNBOUNDED = 10_000


@dataclass(frozen=True)
class Visible:
    """Anything to print, without control characters in its texts: they may come from a stranger's artifact."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.content, options):
            if not segment.control:
                yield Segment(visible(segment.text, lines=True), segment.style)


def result_table(summary: RunSummary) -> ResultTable:
    """A column for each form of the model, a row for each quantity, with the comparison to dense beside each value."""
    return ResultTable(summary)


@dataclass(frozen=True)
class ResultTable:
    """The forms of a run's model side by side; those that the console isn't wide enough for stand below."""

    summary: RunSummary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        yield Text(f"{self.summary.job}  {self.summary.run}", "italic", overflow="fold")
        rest = list(range(len(self.summary.models)))
        while rest:
            fitting = [
                count for count in range(1, len(rest) + 1) if self._width(console, rest[:count]) <= options.max_width
            ]
            count = max(fitting, default=1)
            yield self._part(rest[:count])
            rest = rest[count:]

    def _width(self, console: Console, columns: Sequence[int]) -> int:
        return Measurement.get(console, console.options.update(max_width=_UNBOUNDED), self._part(columns)).maximum

    def _part(self, columns: Sequence[int]) -> Table:
        models = self.summary.models
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for column in columns:
            table.add_column(Text(models[column].name), justify="right", no_wrap=True)
        for row in comparison(models):
            cells = [Text(cell.value) if index == 0 else _cell(cell) for index, cell in enumerate(row.cells)]
            table.add_row(Text(row.label), *(cells[column] for column in columns))
        return table


def print_result(console: Console, summary: RunSummary, artifact_uri: str, report_path: str) -> None:
    """Prints how a run ends: in a sentence, as a table, the verification, warnings, where all is stored, and how to
    load it."""
    console.print()
    print_line(console, outcome(summary), "bold")
    for doubt in doubts(summary):
        print_line(console, f"warning: {doubt}", "bold red")
    console.print(Visible(result_table(summary)))
    for sentence, passed in verification_texts(summary):
        print_line(console, sentence, "" if passed else "bold red")
    for sentence in rounding_texts(summary):
        print_line(console, sentence)
    for warning in summary.warnings:
        print_line(console, f"warning: {warning}", "yellow")
    console.print()
    print_line(console, f"{ARTIFACT_LABEL}{artifact_uri}")
    print_line(console, f"report    {report_path}")
    print_line(console, f"load      {load_line(artifact_uri, summary.runs_alone)}")


def files_table(files: Mapping[str, tuple[int, str]]) -> Table:
    """A stored artifact's files: name -> (bytes, sha256)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("sha256")
    for name, (num_bytes, digest) in sorted(files.items()):
        table.add_row(Text(name), text.size(num_bytes), digest[:16])
    return table


def sweep_table(trials: Sequence[TrialFigures], metric: str, mode: Literal["max", "min"] = "max") -> SweepTable:
    """All trials, the best metric first and failed ones last; a star marks those on the Pareto front."""
    return SweepTable(tuple(ranked(trials, mode)), metric)


@dataclass(frozen=True, repr=False)
class SweepTable(JupyterMixin):
    """The trials of a sweep, and below them where each trial's artifact is, one URI in a line.

    In a notebook, as a text (`print(table)`), and where a console wraps softly, URIs come unbroken whatever the width.

    Args:
        trials: in the order in which they are shown.
        metric: the name of what they are compared by.
    """

    trials: tuple[TrialFigures, ...]
    metric: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.figures()
        for line in self.artifacts():
            yield Text(line, overflow="ignore", no_wrap=True) if console.is_jupyter else Text(line)

    def __str__(self) -> str:
        console = Console(file=StringIO(), force_jupyter=False, force_terminal=False)
        console.print(Visible(self), soft_wrap=True)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    def figures(self) -> Table:
        """What was set and what came of it, or why nothing did."""
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, caption="★ Pareto front of metric against MACs", caption_justify="left"
        )
        keys = list(dict.fromkeys(key for trial in self.trials for key in trial.settings))
        failed = any(trial.error for trial in self.trials)
        table.add_column("")
        table.add_column("trial", no_wrap=True)
        for key in short_keys(keys):
            table.add_column(Text(key), overflow="fold")
        for name in (self.metric, "MACs", "file size"):
            table.add_column(Text(name), justify="right", no_wrap=True)
        if failed:
            table.add_column("error", overflow="fold")
        for trial in self.trials:
            table.add_row(
                "★" if trial.on_front else "",
                Text(trial.trial),
                *(Text(_setting(trial.settings.get(key))) for key in keys),
                text.number(trial.metric),
                text.count(trial.macs),
                text.size(trial.file_bytes),
                *([Text(trial.error, style="red")] if failed else []),
            )
        return table

    def artifacts(self) -> list[str]:
        """Each trial and its artifact's URI, quoted for a shell."""
        return [f"{trial.trial}  {shlex.quote(trial.artifact_uri)}" for trial in self.trials if trial.artifact_uri]


def ranked(trials: Sequence[TrialFigures], mode: Literal["max", "min"] = "max") -> list[TrialFigures]:
    """The best metric first, trials without one last; `mode` says whether more or less of it is better."""
    sign = -1 if mode == "max" else 1
    return sorted(trials, key=lambda trial: (trial.metric is None, sign * (trial.metric or 0.0)))


def short_keys(keys: Sequence[str]) -> list[str]:
    """Each dotted key cut down to the fewest last parts that still tell it from the others."""
    parts = [key.split(".") for key in keys]
    for length in range(1, max(map(len, parts), default=0) + 1):
        shortened = [".".join(part[-length:]) for part in parts]
        if len(set(shortened)) == len(keys):
            return shortened
    return list(keys)


def _cell(cell: Cell) -> Text:
    # The same width with and without a comparison, so that the values of a column stand below each other.
    return Text(cell.value).append(f" {cell.against_dense:>6}", style="red" if cell.worse else "dim")


def _setting(value: object) -> str:
    return text.number(value) if isinstance(value, float) else str(value)


def print_line(console: Console, line: str, style: str = "") -> None:
    """Prints a text of any origin in one line."""
    # A path or URI must come out in one piece, whatever the terminal's width.
    console.print(Text(visible(line), style=style), soft_wrap=True)
