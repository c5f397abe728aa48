"""Who hears of a run's progress."""

from __future__ import annotations

import pytest

import raycomp
from raycomp.distributed.progress import Silent, shown
from raycomp.report import ProgressPrinter
from raycomp.results.progress import ProgressEvent

EVENT = ProgressEvent("fused", 1, 2, 10, 100, 0.5, {}, 0.25, 2, 3.0)


def test_a_plain_function_hears_lines_and_events() -> None:
    heard: list[str | ProgressEvent] = []
    with shown(heard.append) as progress:
        progress.message("a line")
        progress.event(EVENT)
    assert heard == ["a line", EVENT]


def test_a_terminal_sees_it_unasked_and_a_pipe_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with shown(None) as progress:
        assert isinstance(progress, Silent)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with shown(None) as progress:
        assert isinstance(progress, ProgressPrinter)


def test_what_shows_progress_is_public() -> None:
    with shown(printer := ProgressPrinter()) as progress:
        assert progress is printer and isinstance(printer, raycomp.Progress)
    assert raycomp.ProgressEvent is ProgressEvent
