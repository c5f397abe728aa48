"""What the driver hears of trials from Ray Tune, and tells in a line each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ray.tune import Callback, ProgressReporter
from ray.tune.experiment import Trial

from raycomp.distributed.progress import Progress, Silent
from raycomp.report import text
from raycomp.report.table import short_keys
from raycomp.tune.trial import FAILED

_ERROR_LINE = re.compile(r"[\w.]*(Error|Exception): .+")


class TrialEvents(Callback):
    """Tells `progress` when trials begin and end, and keeps the causes of those that Ray Tune lost.

    Args:
        progress: who shows it.
        ended: gets the trials that end.
    """

    def __init__(self, progress: Progress, ended: set[str]) -> None:
        self._progress, self._ended = progress, ended
        self.lost: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune stores its settings with the sweep; a terminal is no part of them.
        return {"_progress": Silent(), "_ended": set(), "lost": self.lost}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        settings = trial.config["trial"]["settings"]
        shown = zip(short_keys(list(settings)), settings.values(), strict=True)
        self._say(trial, "begins: " + ", ".join(f"{key} {_value(value)}" for key, value in shown))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        result = trial.last_result or {}
        self._ended.add(trial.config["trial"]["id"])
        figures = [f"{text.count(result['macs'])} MACs"] if result.get("macs") is not None else []
        self._say(trial, f"failed: {result[FAILED]}" if result.get(FAILED) else ", ".join(["ended", *figures]))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._say(trial, f"is tried again: {_cause(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cause = _cause(trial)
        self.lost[trial.config["trial"]["id"]] = cause
        self._say(trial, f"is lost: {cause}")

    def _say(self, trial: Trial, line: str) -> None:
        self._progress.message(f"trial {trial.config['trial']['id']} {line}")


class Unheard(ProgressReporter):
    """Reports nothing. Ray Tune's own clears a notebook's cell and shows an empty object there, however quiet it is."""

    def setup(self, *args: Any, **settings: Any) -> None:
        """Nothing."""

    def should_report(self, trials: list[Trial], done: bool = False) -> bool:
        """Never."""
        return False

    def report(self, trials: list[Trial], done: bool, *sys_info: dict[str, Any]) -> None:
        """Nothing."""


def last_error(text: str) -> str:
    """The cause of the last failure in Ray Tune's record of a trial's failures, in one line."""
    lines = [line.strip() for line in text.rpartition("Failure #")[2].splitlines()[1:] if line.strip()]
    named = [line for line in lines if _ERROR_LINE.fullmatch(line)]
    return (named[-1:] or lines[:1] or ["its process was lost"])[0]


def _cause(trial: Trial) -> str:
    # Ray Tune's own copy in storage comes later than its calls here.
    file = Path(trial.error_file) if trial.error_file else None
    return last_error(file.read_text(errors="replace") if file is not None and file.is_file() else "")


def _value(value: object) -> str:
    return text.number(value) if isinstance(value, float) else str(value)
