"""What a run reports: figures as values, terminal tables, progress lines and self-contained HTML; no torch, no Ray."""

from __future__ import annotations

from raycomp.report.html import render_report, render_sweep, write_report
from raycomp.report.progress import ProgressPrinter
from raycomp.report.table import files_table, print_result, result_table, sweep_table

__all__ = [
    "ProgressPrinter",
    "files_table",
    "print_result",
    "render_report",
    "render_sweep",
    "result_table",
    "sweep_table",
    "write_report",
]
