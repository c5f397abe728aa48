"""What is kept of a stage for the stages after it and for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from raycomp.core.masks import Masks
from raycomp.pipeline.ending.artifact import MASKS
from raycomp.pipeline.masks_file import load_masks, save_masks
from raycomp.pipeline.stage import StageResult
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import Unpruned, Verification

_OUTCOME = "outcome.json"


@dataclass(frozen=True)
class StageOutcome:
    """A stage's part of the report.

    Args:
        history: its progress.
        verification: of its speedup; None without one.
        unpruned: what is masked and stayed.
        notes: what else should be said.
    """

    history: tuple[ProgressEvent, ...]
    verification: Verification | None
    unpruned: tuple[Unpruned, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, result: StageResult, state: StageState) -> StageOutcome:
        """The outcome of a finished stage."""
        return cls(state.history, result.verification, result.unpruned, result.notes)


_ADAPTER = TypeAdapter(StageOutcome)


def save_outcome(folder: Path, outcome: StageOutcome, result: StageResult) -> None:
    """Writes a stage's outcome, its masks, and where the next stage starts."""
    result.next_start().save(folder)
    save_masks(folder / MASKS, result.masks)
    (folder / _OUTCOME).write_bytes(_ADAPTER.dump_json(outcome))


def load_outcome(folder: Path) -> tuple[StageOutcome, Masks]:
    """A stage's outcome and masks."""
    outcome = _ADAPTER.validate_json((folder / _OUTCOME).read_bytes())
    return outcome, load_masks(folder / MASKS)
