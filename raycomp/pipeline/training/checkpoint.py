"""A stage's checkpoint: a folder of safetensors and JSON from which training goes on exactly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from raycomp.errors import ArtifactError
from raycomp.results.progress import ProgressEvent
from raycomp.storage import Store, join_state, load_tensors, open_store, save_tensors, split_state
from raycomp.storage.digest import file_digest
from raycomp.storage.explain import explained

_FORMAT = 3
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
            "stage": self.stage,
            "epoch": self.epoch,
            "step": self.step,
            "training": plain,
            "history": _HISTORY.dump_python(self.history, mode="json"),
            "notes": self.notes,
            "files": {name: file_digest(folder / name) for name in (_MODEL, _STATE)},
        }
        text = json.dumps(content)
        with explained(str(folder)):
            (folder / _PROGRESS).write_text(json.dumps({"format": _FORMAT, "sha256": _sha256(text), "content": text}))

    @classmethod
    def load(cls, folder: Path) -> StageState:
        """Reads what `save` wrote.

        Raises:
            ArtifactError: the folder holds something else or another format, or is damaged.
            StorageError: it can't be read.
        """
        content = _whole_content(folder)
        try:
            return cls(
                stage=content["stage"],
                epoch=content["epoch"],
                step=content["step"],
                model=load_tensors(folder / _MODEL),
                training=join_state(load_tensors(folder / _STATE), content["training"]),
                history=_HISTORY.validate_python(content["history"]),
                notes=tuple(content["notes"]),
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise ArtifactError(f"it is not a stage's checkpoint: {error!r}", where=str(folder)) from None


def epochs_done(place: Store) -> int:
    """How far the training was when the checkpoint at a place was saved.

    Raises:
        ArtifactError: it does not say so, or is damaged.
        StorageError: it can't be read.
    """
    epoch = _content(place)["epoch"]
    if not isinstance(epoch, int):
        raise ArtifactError(f"it is not a stage's checkpoint: its epoch is {epoch!r}", where=place.uri)
    return epoch


def _whole_content(folder: Path) -> dict[str, Any]:
    """What is in the checkpoint besides its tensors; all its files are what their digests say."""
    content = _content(open_store(folder))
    for name, digest in content["files"].items():
        if not (folder / name).is_file():
            raise ArtifactError(f"it is not whole: {name} is missing", where=str(folder))
        if file_digest(folder / name) != digest:
            raise ArtifactError(f"it is damaged: {name} has another digest than {_PROGRESS} says", where=str(folder))
    return content


def _content(place: Store) -> dict[str, Any]:
    if not place.exists(_PROGRESS):
        raise ArtifactError(f"it is not a stage's checkpoint: {_PROGRESS} is missing", where=place.uri)
    try:
        stored = json.loads(place.read_bytes(_PROGRESS))
        found, text, sha256 = stored["format"], stored.get("content"), stored.get("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"it is damaged: {_PROGRESS}: {error}", where=place.uri) from None
    if found != _FORMAT:
        raise ArtifactError(f"its format is {found}, this raycomp reads {_FORMAT}", where=place.uri)
    if _sha256(str(text)) != sha256:
        raise ArtifactError(f"it is damaged: {_PROGRESS} has another digest than it says", where=place.uri)
    content: dict[str, Any] = json.loads(text)
    return content


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
