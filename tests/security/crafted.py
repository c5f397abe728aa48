"""Artifacts as an attacker would leave them: a real one, changed, with every hash computed anew."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.core.masks import Masks
from raycomp.deploy.int8 import lower_int8
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.pt2 import export_pt2
from raycomp.pipeline.ending import artifact as files
from raycomp.pipeline.masks_file import save_masks
from raycomp.pipeline.notes import Notes
from raycomp.quantization import QATQuantizer
from raycomp.results.summary import RunSummary
from raycomp.speedup import ModelSpeedup
from raycomp.storage import open_store, publish, save_tensors
from tests.report.summaries import summary

Change = Callable[[Any], Any]
EXAMPLE = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(4))
GONE = (1, 4)


class Net(nn.Module):
    """States the size of its channels as a constant, so that its plan holds a rewritten forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).view(-1, 6 * 16))


def fresh() -> Net:
    """The network as its user would make it."""
    torch.manual_seed(0)
    return Net()


def publish_real(folder: Path) -> Path:
    """A small artifact with every file that a run writes; returns its folder."""
    written = folder / "files"
    written.mkdir()
    model = fresh().eval()
    mask = torch.ones_like(model.conv.weight)
    mask[list(GONE)] = 0
    bias = torch.ones(6)
    bias[list(GONE)] = 0
    masks = Masks({"conv": {"weight": mask, "bias": bias}})
    speedup = ModelSpeedup(model, EXAMPLE, masks)
    small = speedup.speedup_model().eval()
    save_tensors(written / files.MODEL, dict(small.state_dict()))
    (written / files.PLAN).write_text(speedup.plan.to_json())
    export_pt2(small, EXAMPLE, written / files.PROGRAM)
    export_onnx(small, EXAMPLE, written / files.ONNX)
    calibration = _quantized(written / files.INT8)
    save_masks(written / files.MASKS, masks)
    content = {"folds": [], "targets": files._plain(calibration)}
    (written / files.CALIBRATION).write_text(json.dumps(content, indent=1))
    found = replace(summary(), artifact_uri="")
    files.write_summary(written, found, Notes())
    fields = {"job": found.job, "run": found.run, "created": found.created, "figures": found.figures()}
    return Path(publish(open_store(str(folder / "store")), "r1", written, fields).uri)


def _quantized(path: Path) -> Any:
    model = fresh()
    weight = {"quant_dtype": "int8", "granularity": "out_channel"}
    activation = {"quant_dtype": "uint8", "quant_scheme": "affine"}
    settings = {"weight": weight, "_input_": activation}
    entry = {"op_types": ["Linear"], "target_names": ["_input_", "weight"], "target_settings": settings}

    def train(model: nn.Module, optimizer: Any, step: Any, *args: Any, **more: Any) -> None:
        for _ in range(3):
            step(EXAMPLE, model).backward()

    evaluator = TorchEvaluator(train, torch.optim.SGD(model.parameters(), lr=0.0), lambda batch, m: m(batch).sum())
    quantizer = QATQuantizer(model, [entry], evaluator)
    _, calibration = quantizer.compress(max_steps=3)
    quantizer.unwrap_model()
    lower_int8(model.eval(), calibration, [], EXAMPLE).save(path)
    return calibration


def crafted(real: Path, target: Path, changes: dict[str, bytes | Change]) -> str:
    """A copy of an artifact with files replaced, or (JSON) changed, and a manifest that vouches for them."""
    shutil.copytree(real, target)
    manifest = json.loads((target / "manifest.json").read_text())
    for name, change in changes.items():
        path = target / name
        if name == "manifest.json":
            manifest = edited(manifest, change)  # type: ignore[arg-type]
            continue
        content = (
            change if isinstance(change, bytes) else json.dumps(edited(json.loads(path.read_text()), change)).encode()
        )
        path.write_bytes(content)
        manifest["files"][name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return str(target)


def edited(value: Any, change: Change) -> Any:
    """The value, changed in place or replaced."""
    found = change(value)
    return value if found is None else found


def rezipped(content: bytes, changes: dict[str, bytes | Change], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with files replaced, added, or (JSON) changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        root = old.namelist()[0].split("/")[0]
        contents = {name.removeprefix(f"{root}/"): old.read(name) for name in old.namelist()}
        for name, change in changes.items():
            contents[name] = (
                change if isinstance(change, bytes) else json.dumps(edited(json.loads(contents[name]), change)).encode()
            )
        for name, data in contents.items():
            new.writestr(f"{root}/{name}", data)
    return buffer.getvalue()


def summary_of(real: Path) -> RunSummary:
    """The summary that an artifact holds."""
    return RunSummary.from_json((real / files.SUMMARY).read_bytes())
