"""Reading a stored run back: the model ready to run, and its exports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from torch import nn

from raycomp.config import nearest
from raycomp.deploy.onnx_runtime import load_onnx
from raycomp.deploy.pt2 import load_pt2
from raycomp.errors import ArtifactError, RaycompError, StorageError
from raycomp.pipeline.ending import artifact as files
from raycomp.pipeline.ending.calibration_file import read_calibration
from raycomp.pipeline.ending.conclude import Conclusion
from raycomp.pipeline.masks_file import load_masks
from raycomp.results.summary import RunSummary
from raycomp.speedup import Plan, apply_plan
from raycomp.storage import Artifact, load_tensors, open_artifact
from raycomp.storage.artifact import understood
from raycomp.storage.explain import explained

_FORMATS = {
    "onnx": (files.ONNX, files.INT8),
    "pt2": (files.PROGRAM,),
    "state-dict": (files.MODEL, files.PLAN),
    "report": (files.REPORT,),
}


def load(
    uri: str,
    model: nn.Module | None = None,
    *,
    int8: bool = False,
    endpoint: str | None = None,
    region: str | None = None,
) -> nn.Module:
    """The sped-up model of a stored run, in eval mode, ready to run.

    Every file is checked against the manifest's size and sha256, and nothing is unpickled. Without `model` no source of
    the user's is needed: the exported program runs. With it the stored surgery is repeated on that instance, which
    gives back the user's own class, ready to train.

    Args:
        uri: the artifact's place.
        model: a fresh instance of the class that was compressed.
        int8: the real int8 model instead, run by ONNX Runtime.
        endpoint: of the object store, where the URI and the environment don't say it.
        region: likewise.

    Raises:
        ArtifactError: there is no such artifact, or it isn't whole, or not what raycomp writes.
        SpeedupError: its model isn't one that raycomp loads, or the given instance isn't what was compressed.
    """
    with understood(str(uri)):
        artifact = open_artifact(uri, endpoint, region)
    with TemporaryDirectory() as name, understood(artifact.uri, Path(name)):
        folder = Path(name)
        if int8:
            return load_onnx(_fetch(artifact, files.INT8, folder))
        if model is None:
            return load_pt2(_fetch(artifact, files.PROGRAM, folder))
        return _repeated(model, _fetch(artifact, files.PLAN, folder), _fetch(artifact, files.MODEL, folder))


def _repeated(model: nn.Module, plan: Path, state: Path) -> nn.Module:
    """The instance, cut as the plan says, with the stored weights."""
    weights = load_tensors(state)
    # What one stage adds, a later one may cut.
    most_added = 2**20 + 4 * sum(tensor.numel() for tensor in weights.values())
    smaller = apply_plan(model, Plan.from_json(plan.read_bytes(), most_added))
    dtype = next((value.dtype for value in weights.values() if value.is_floating_point()), None)
    try:
        smaller.to(dtype).load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ArtifactError(
            f"the stored weights don't fit the model: {' '.join(lines[:2])}",
            where=str(state),
            remedy="give an instance of the class that was compressed, made with the same arguments",
        ) from error
    return smaller.eval()


def stored_conclusion(artifact: Artifact) -> Conclusion:
    """Summary, masks and calibration of a stored run.

    Raises:
        ArtifactError: one of them isn't there, or isn't what a run writes.
    """
    with TemporaryDirectory() as folder, understood(artifact.uri, Path(folder)):
        masks = load_masks(_fetch(artifact, files.MASKS, Path(folder)))
        calibration = read_calibration(artifact.read_bytes(files.CALIBRATION))
        return Conclusion(RunSummary.from_json(artifact.read_bytes(files.SUMMARY)), masks, calibration)


def export(
    uri: str, to: str, directory: Path | str, endpoint: str | None = None, region: str | None = None
) -> tuple[Path, ...]:
    """Copies a stored model into a folder, verified.

    Args:
        uri: the artifact's place.
        to: `onnx` (float, and int8 where there is one), `pt2`, `state-dict` (with the surgery's plan), or `report`.
        directory: is made if it isn't there.

    Returns:
        The files.

    Raises:
        RaycompError: an unknown format.
        ArtifactError: the artifact isn't there or isn't whole, or lacks that format.
        StorageError: the folder can't be written.
    """
    if to not in _FORMATS:
        raise RaycompError(f"can't export to {to!r}", where="to", remedy=nearest(to, _FORMATS))
    with understood(str(uri)):
        artifact = open_artifact(uri, endpoint, region)
    names = [name for name in _FORMATS[to] if name in artifact.names]
    if not names:
        raise ArtifactError(f"the artifact has no {to} form", where=artifact.uri, remedy="see the report's warnings")
    with _writing(Path(directory)):
        Path(directory).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        with understood(str(uri)):
            fetched = [artifact.fetch(name, Path(folder)) for name in names]
        return tuple(_copy(path, Path(directory)) for path in fetched)


def _copy(path: Path, directory: Path) -> Path:
    """A whole copy of a file, or none."""
    target, partial = directory / path.name, directory / f".{path.name}.{uuid4().hex}"
    with _writing(target):
        try:
            shutil.copy(path, partial)
            partial.replace(target)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    return target


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns an OSError of the block into an error about what can't be written, and why."""
    try:
        with explained(str(target)):
            yield
    except StorageError as error:
        remedy = error.remedy or "choose a folder that you may write"
        raise StorageError(f"it can't be written: {error.message}", where=error.where, remedy=remedy) from error


def _fetch(artifact: Artifact, name: str, folder: Path) -> Path:
    if name not in artifact.names:
        raise ArtifactError(f"it has no {name}", where=artifact.uri, remedy=f"it has {', '.join(artifact.names)}")
    return artifact.fetch(name, folder)
