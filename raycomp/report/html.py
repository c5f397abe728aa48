"""Reports as single HTML files: no network, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Literal

from raycomp.report import sections, text
from raycomp.report.markup import Column, page, paragraph, section, table
from raycomp.report.plots import Dot, scatter
from raycomp.report.table import ranked, short_keys
from raycomp.results.summary import RunSummary, TrialFigures

_SECTIONS = (
    sections.headline,
    sections.result,
    sections.what_was_run,
    sections.verification,
    sections.int8,
    sections.curves,
    sections.searches,
    sections.layers,
    sections.unpruned,
    sections.timings,
    sections.environment,
    sections.job_file,
)


def render_report(summary: RunSummary) -> str:
    """A run's report as one HTML document."""
    parts = [part for part in (make(summary) for make in _SECTIONS) if part]
    return page(f"{summary.job}: compressed model", "\n".join(parts))


def write_report(summary: RunSummary, path: Path) -> None:
    """Writes `render_report(summary)` to `path`."""
    path.write_text(render_report(summary), encoding="utf-8")


def render_sweep(name: str, trials: Sequence[TrialFigures], metric: str, mode: Literal["max", "min"] = "max") -> str:
    """A sweep's report: the Pareto plot of metric against MACs and all trials in a table."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    columns = (
        Column("Front"),
        Column("Trial"),
        *(Column(key) for key in short_keys(keys)),
        Column(metric, "num"),
        Column("MACs", "num"),
        Column("File", "num"),
        Column("Artifact or error", "name"),
    )
    rows = [
        (
            "★" if trial.on_front else "",
            escape(trial.trial),
            *(escape(str(trial.settings.get(key, ""))) for key in keys),
            text.number(trial.metric),
            text.count(trial.macs),
            text.size(trial.file_bytes),
            escape(trial.error or trial.artifact_uri),
        )
        for trial in ranked(trials, mode)
    ]
    dots = [
        Dot(trial.macs, trial.metric, f"{trial.trial}: {text.number(trial.metric)}", trial.on_front)
        for trial in trials
        if trial.macs is not None and trial.metric is not None
    ]
    front = f"Filled points are on the Pareto front: no other trial has both a better {metric} and fewer MACs."
    return page(
        f"{name}: sweep",
        "\n".join(
            (
                f"<h1>{escape(name)}: sweep of {len(trials)} trials</h1>",
                section(
                    f"{metric} against MACs",
                    scatter(dots, label=f"{metric} against MACs", x_label="MACs"),
                    paragraph(front, "soft"),
                ),
                section("Trials", table(columns, rows)),
            )
        ),
    )
