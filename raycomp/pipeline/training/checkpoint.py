"""A stage's checkpoint: a folder of safetensors and JSON from which training goes on exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from raycomp.errors import ArtifactError
from raycomp.results.progress import ProgressEvent
from raycomp.storage import join_state, load_tensors, save_tensors, split_state
from raycomp.storage.explain import explained

_FORMAT = 2
_MODEL, _STATE, _PROGRESS = "model.safetensors", "state.safetensors", "progress.json"
_HISTORY = TypeAdapter(tuple[ProgressEvent, ...])


@dataclass(frozen=True)
class StageState:
    """Where a stage's training stands at the end of an epoch.

    Args:
        stage: the stage's name.
        epoch: epochs done.
        step: optimizer steps done.
        model: the wrapped model's state dict, masks and scales among it.
        training: the states of optimizer, scheduler and chain.
        history: the progress so far.
        notes: what the report should say.
    """

    stage: str
    epoch: int
    step: int
    model: dict[str, Tensor]
    training: dict[str, Any]
    history: tuple[ProgressEvent, ...]
    notes: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Writes the state into `folder`."""
        tensors, plain = split_state(self.training)
        save_tensors(folder / _MODEL, self.model)
        save_tensors(folder / _STATE, tensors)
        content = {
            "format": _FORMAT,
            "stage": self.stage,
            "epoch": self.epoch,
            "step": self.step,
            "training": plain,
            "history": _HISTORY.dump_python(self.history, mode="json"),
            "notes": self.notes,
        }
        with explained(str(folder)):
            (folder / _PROGRESS).write_text(json.dumps(content))

    @classmethod
    def load(cls, folder: Path) -> StageState:
        """Reads what `save` wrote.

        Raises:
            ArtifactError: the folder holds something else, or another format.
        """
        try:
            content = json.loads((folder / _PROGRESS).read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"it is not a stage's checkpoint: {error}", where=str(folder)) from None
        if content.get("format") != _FORMAT:
            raise ArtifactError(
                f"its format is {content.get('format')}, this raycomp reads {_FORMAT}", where=str(folder)
            )
        return cls(
            stage=content["stage"],
            epoch=content["epoch"],
            step=content["step"],
            model=load_tensors(folder / _MODEL),
            training=join_state(load_tensors(folder / _STATE), content["training"]),
            history=_HISTORY.validate_python(content["history"]),
            notes=tuple(content["notes"]),
        )
