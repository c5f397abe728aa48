"""Who hears of a run's progress."""

from __future__ import annotations

from typing import Any

import pytest

import raycomp
from raycomp.distributed.progress import Silent, shown
from raycomp.errors import ConfigError
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
    assert isinstance(ProgressPrinter(), raycomp.Progress)
    assert raycomp.ProgressEvent is ProgressEvent


class _Listener:
    def __init__(self) -> None:
        self.heard: list[str | ProgressEvent] = []

    def message(self, line: str) -> None:
        self.heard.append(line)

    def event(self, event: ProgressEvent) -> None:
        self.heard.append(event)
        raise ValueError("no plot")


def test_a_listener_s_own_error_is_told_once_and_costs_no_training() -> None:
    listener = _Listener()
    told = "progress raised ValueError: no plot; it hears no more"
    with shown(listener) as progress, pytest.warns(RuntimeWarning, match=told) as warned:
        progress.message("a line")
        for _ in range(3):
            progress.event(EVENT)
        progress.message("another")
    assert listener.heard == ["a line", EVENT] and len(warned) == 1


class _Half:
    def message(self, line: str) -> None:
        """Nothing."""


@pytest.mark.parametrize("given", [object(), _Half(), "tqdm"])
def test_what_can_t_be_told_is_refused_with_what_would_be_right(given: Any) -> None:
    right = r"progress: got an object of type .*message\(line\) and event\(event\)"
    with pytest.raises(ConfigError, match=right), shown(given):
        raise AssertionError("it was taken")
