"""The files of an artifact: everything that is needed to trust, serve and repeat a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from torch import Tensor

from raycomp.config.dialect import JobDumper
from raycomp.core.masks import Masks
from raycomp.deploy.int8 import Int8Model
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.pt2 import export_pt2
from raycomp.pipeline.masks_file import save_masks
from raycomp.pipeline.notes import Notes
from raycomp.pipeline.stage import StageResult
from raycomp.report.html import write_report
from raycomp.results.summary import RunSummary, SearchFigures
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


def write_models(
    folder: Path, result: StageResult, int8: Int8Model | None, example: Any, others: Sequence[Any], notes: Notes
) -> None:
    """Writes the sped-up model in every form.

    Args:
        folder: where.
        result: the last stage's.
        int8: the int8 model, if there is one.
        example: an input to trace with.
        others: further inputs, of other sizes.
        notes: hears what could not be written, and which files take one size alone.
    """
    save_tensors(folder / MODEL, dict(result.model.state_dict()))
    (folder / PLAN).write_text(result.plan.to_json())
    for name, export in ((PROGRAM, export_pt2), (ONNX, export_onnx)):
        with notes.instead_of(f"there is no {name}"):
            _say_sizes(name, export(result.model, example, folder / name, others).fixed, notes)
    if int8 is not None:
        int8.save(folder / INT8)
        _say_sizes(INT8, int8.fixed, notes)


def _say_sizes(name: str, fixed: Sequence[str], notes: Notes) -> None:
    if fixed:
        notes.say(f"{name} takes {', '.join(fixed)} alone, where real batches differ: pad or resize to it")


def write_statistics(folder: Path, masks: Masks, final: StageResult) -> None:
    """Writes the masks of all stages and the final calibration."""
    save_masks(folder / MASKS, masks)
    content = {"folds": final.folds, "targets": _plain(final.calibration)}
    (folder / CALIBRATION).write_text(json.dumps(content, indent=1))


def write_summary(folder: Path, summary: RunSummary, notes: Notes) -> RunSummary:
    """Writes the report, the summary, the job file and the history of the metrics.

    Returns:
        The summary with a note on each of them that could not be written.
    """
    (folder / "job.yaml").write_text(summary.config_yaml)
    with notes.instead_of("there is no searched.yaml"):
        _write_searches(folder / "searched.yaml", summary.searches)
    with notes.instead_of("there is no metrics.parquet"):
        _write_history(folder / "metrics.parquet", summary)
    with notes.instead_of("there is no report"):
        write_report(replace(summary, warnings=notes()), folder / REPORT)
    told = replace(summary, warnings=notes())
    (folder / SUMMARY).write_text(told.to_json())
    return told


def _write_searches(path: Path, found: Sequence[SearchFigures]) -> None:
    """What searches found, as config lists of their pruners."""
    if found:
        content = [
            {"stage": each.stage, "compressor": each.compressor, "config_list": each.config_list} for each in found
        ]
        path.write_text(yaml.dump(content, Dumper=JobDumper, sort_keys=False, width=120))


def _write_history(path: Path, summary: RunSummary) -> None:
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
    pq.write_table(pa.Table.from_pylist(rows), path)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
