"""The files of an artifact: everything that is needed to trust, serve and repeat a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from raycomp.core.masks import Masks
from raycomp.deploy.int8 import Int8Model
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.pt2 import export_pt2
from raycomp.errors import SpeedupError
from raycomp.pipeline.masks_file import save_masks
from raycomp.pipeline.stage import StageResult
from raycomp.report.html import write_report
from raycomp.results.summary import RunSummary
from raycomp.storage import save_tensors

REPORT, SUMMARY, PLAN, MASKS, CALIBRATION, MODEL, PROGRAM, ONNX, INT8 = (
    "report.html",
    "summary.json",
    "plan.json",
    "masks.safetensors",
    "calibration.json",
    "model.safetensors",
    "model.pt2",
    "model.onnx",
    "int8.onnx",
)


def write_models(folder: Path, result: StageResult, int8: Int8Model | None, example: Any) -> tuple[str, ...]:
    """Writes the sped-up model in every form, and returns what could not be written and why."""
    notes = []
    save_tensors(folder / MODEL, dict(result.model.state_dict()))
    (folder / PLAN).write_text(result.plan.to_json())
    for name, export in ((PROGRAM, export_pt2), (ONNX, export_onnx)):
        try:
            export(result.model, example, folder / name)
        except SpeedupError as error:
            notes.append(f"there is no {name}: {error}")
    if int8 is not None:
        int8.save(folder / INT8)
    return tuple(notes)


def write_statistics(folder: Path, masks: Masks, final: StageResult) -> None:
    """Writes the masks of all stages and the final calibration."""
    save_masks(folder / MASKS, masks)
    content = {"folds": final.folds, "targets": _plain(final.calibration)}
    (folder / CALIBRATION).write_text(json.dumps(content, indent=1))


def write_summary(folder: Path, summary: RunSummary) -> None:
    """Writes the report, the summary, the job file and the history of the metrics."""
    (folder / "job.yaml").write_text(summary.config_yaml)
    (folder / SUMMARY).write_text(summary.to_json())
    write_report(summary, folder / REPORT)
    names = list(dict.fromkeys(name for event in summary.history for name in event.metrics))
    rows = [
        {
            "stage": event.stage,
            "epoch": event.epoch,
            "step": event.step,
            "loss": event.loss,
            "sparsity": event.sparsity,
            "workers": event.workers,
            "elapsed_s": event.elapsed_s,
            **{f"metric.{name}": event.metrics.get(name) for name in names},
        }
        for event in summary.history
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metrics.parquet")


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
