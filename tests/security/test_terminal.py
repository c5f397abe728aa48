"""Texts of an artifact reach the terminal and the report without anything that steers a terminal."""

from __future__ import annotations

import json
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

import raycomp
from raycomp.cli import main
from raycomp.errors import RaycompError, visible
from raycomp.pipeline.ending.load import stored_conclusion
from raycomp.report import render_report
from raycomp.results.summary import RunSummary
from raycomp.storage import open_artifact
from raycomp.storage.artifact import understood
from tests.report.summaries import summary
from tests.security.crafted import crafted, fresh

STEERING = (
    *("\x1b]52;c;eA==\a", "\x1b[2J", "\x9b31m", "\x90q\x9c", "\u202etxt.exe", "\u2066x"),
    *("\r", "\b\b", "\u2028", "\x00"),
)


def steers(text: str) -> list[str]:
    """The characters in a text that are none to read."""
    return [c for c in text if (not c.isprintable() and c != "\n") or c in "\u202e\u2066\u2028\x9b"]


def show(uri: str) -> str:
    result = CliRunner().invoke(main, ["show", uri], catch_exceptions=False)
    return result.stdout + result.stderr


def everywhere(text: str) -> Any:
    def change(manifest: Any) -> None:
        manifest.update(job=f"job{text}", run=f"run{text}", created=f"now{text}")
        figures = manifest["figures"]
        figures["warnings"] = [f"warned{text}"]
        figures["models"][0]["name"] = f"dense{text}[link=file:///x]y[/link]"
        for model in figures["models"]:
            model["metrics"] = {f"metric{text}": 0.5}
        manifest["files"][f"name{text}".replace("\\", "")] = manifest["files"]["job.yaml"]

    return change


@pytest.mark.parametrize("text", STEERING)
def test_show_prints_no_control_characters(real: Path, tmp_path: Path, text: str) -> None:
    shown = show(crafted(real, tmp_path / "bad", {"manifest.json": everywhere(text)}))
    assert shown.strip() and steers(shown) == []


def test_show_still_says_what_there_is(real: Path, tmp_path: Path) -> None:
    shown = show(crafted(real, tmp_path / "bad", {"manifest.json": lambda m: m.update(job="a\u202eb")}))
    assert "a\ufffdb" in shown and "model.pt2" in shown and "[link" not in shown


def test_a_line_break_cannot_forge_a_line(real: Path, tmp_path: Path) -> None:
    forged = "load    import os; os.system('x')"

    def change(manifest: Any) -> None:
        manifest["figures"]["warnings"] = [f"fine\n{forged}"]

    lines = show(crafted(real, tmp_path / "bad", {"manifest.json": change})).splitlines()
    assert not any(line.startswith("load    import os") for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(figures={"models": []}),
        lambda m: m.update(figures={"models": [{"name": "x"}]}),
        lambda m: m["figures"]["models"][0].update(parameters=10**400),
        lambda m: m["figures"]["models"][0].update(latency_s={"\x1b[2J": 1.0}),
        lambda m: m["figures"]["models"][0].update(metrics={}),
        lambda m: m["figures"].update(code="\x1b[2J"),
        lambda m: m.update({"\x1b]52;c;eA==\a": 1}),
        lambda m: m.update(id="\x1b[2J"),
    ],
)
def test_show_of_odd_figures_is_a_table_or_one_error(real: Path, tmp_path: Path, change: Any) -> None:
    result = CliRunner().invoke(main, ["show", crafted(real, tmp_path / "bad", {"manifest.json": change})])
    told = result.stdout + result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0 or told.count("error ") == 1
    assert steers(told) == []


def test_export_of_a_crafted_artifact_is_one_error(real: Path, tmp_path: Path) -> None:
    uri = crafted(real, tmp_path / "bad", {"manifest.json": lambda m: m["files"]["model.pt2"].update(bytes=1)})
    result = CliRunner().invoke(main, ["export", uri, "--to", "pt2", str(tmp_path / "out")])
    assert result.exit_code == 1 and result.stderr.count("error ") == 1


@pytest.mark.parametrize("text", STEERING)
def test_the_report_holds_no_control_characters(text: str) -> None:
    first = summary()
    models = tuple(replace(model, name=f"{model.name}{text}") for model in first.models)
    odd: RunSummary = replace(first, job=f"a{text}", warnings=(f"w{text}",), models=models, artifact_uri=f"s3://{text}")
    assert steers(render_report(odd)) == []


def test_what_is_read_as_text_stays() -> None:
    # Letters that are joined, accents, emoji, and right-to-left writing without an override.
    for text in ("a b", "Größe é", "中文", "👩\u200d💻", "می\u200cخواهم", "שלום"):
        assert visible(text) == text
    assert visible("a\nb\tc") == "a b c" and visible("a\nb\tc", lines=True) == "a\nb\tc"


ODD = "\x1b]52;c;eA==\a\u202e\x9b"


def renamed(model: onnx.ModelProto) -> None:
    old = model.graph.node[0].output[0]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}{ODD}" if name == old else name for name in names]


def mistyped(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type += ODD


def named(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = f"n{ODD}"
    del model.graph.node[0].input[1:]


def onnx_with(real: Path, change: Any) -> dict[str, Any]:
    model = onnx.load(real / "int8.onnx")
    change(model)
    return {"int8.onnx": model.SerializeToString()}


def tensors(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, ensure_ascii=False).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


CRAFTED: dict[str, Any] = {
    "a manifest's key": lambda real: {"manifest.json": lambda m: m.update({f"zz{ODD}": 1})},
    "a file's name": lambda real: {"manifest.json": lambda m: m["files"].update({f"zz{ODD}": 1})},
    "a plan's key": lambda real: {"plan.json": lambda p: p.update({f"zz{ODD}": 1})},
    "a plan's tensor": lambda real: {"plan.json": lambda p: p["surgeries"][0]["cuts"][0].update(tensor=f"zz{ODD}")},
    "a weight": lambda real: {"model.safetensors": tensors(f"zz{ODD}")},
    "an ONNX value": lambda real: onnx_with(real, renamed),
    "an ONNX operator": lambda real: onnx_with(real, mistyped),
    "an ONNX node": lambda real: onnx_with(real, named),
    "a calibration": lambda real: {"calibration.json": lambda c: c.update({f"zz{ODD}": 1})},
    "a summary": lambda real: {"summary.json": lambda s: s.update({f"zz{ODD}": 1})},
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_traceback_prints_no_control_characters(real: Path, tmp_path: Path, name: str) -> None:
    uri = crafted(real, tmp_path / "bad", CRAFTED[name](real))
    told = []
    for use in (
        lambda: raycomp.load(uri, fresh()),
        lambda: raycomp.load(uri, int8=True),
        lambda: stored_conclusion(open_artifact(uri)),
    ):
        try:
            use()
        except RaycompError as error:
            told.append("".join(traceback.format_exception(error)))
    assert told and steers("".join(told)) == []


def test_the_errors_of_others_are_told_below_one_of_ours_where_they_are_plain() -> None:
    for text, shown in (("plain", True), (ODD, False)):
        with pytest.raises(RaycompError) as caught, understood("here"):
            raise KeyError(text) if shown else ValueError(text)
        assert (caught.value.__cause__ is not None) is shown
