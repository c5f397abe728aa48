from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from raycomp.report import files_table, print_result, render_report, result_table, sweep_table
from raycomp.report.comparison import comparison, rounding_texts, verification_texts
from raycomp.report.table import ARTIFACT_LABEL, Visible, short_keys
from raycomp.results.summary import ModelFigures, RunSummary, Simulation, Verification
from tests.report.summaries import summary, trials


def _shown(*renderables: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(*renderables)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def _line(text: str, start: str) -> list[str]:
    (found,) = [line.split() for line in text.splitlines() if line.strip().startswith(start)]
    return found


def test_each_quantity_stands_beside_dense() -> None:
    text = _shown(result_table(summary()))
    assert _line(text, "dense") == ["dense", "simulated", "sped-up", "int8"]
    assert _line(text, "accuracy") == ["accuracy", "0.99", "0.985", "−0.005", "0.985", "−0.005", "0.984", "−0.006"]
    assert " ".join(_line(text, "MACs")) == "MACs 4.00 M 4.00 M 1.00 M 4.00× 1.00 M 4.00×"
    assert " ".join(_line(text, "file size")) == "file size 400 kB 400 kB 100 kB 4.00× 32.0 kB 12.5×"
    assert " ".join(_line(text, "latency, batch 1 ")).endswith("400 µs 2.00× 200 µs 4.00×")


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    assert max(map(len, _shown(result_table(summary()), width=200).splitlines())) > 60
    assert "…" not in _shown(result_table(summary()))


def test_slower_than_dense_is_set_off() -> None:
    latency = comparison(summary().models)[-1]
    assert [cell.worse for cell in latency.cells] == [False, True, False, False]


def test_batches_stand_in_the_order_of_numbers() -> None:
    model = ModelFigures("dense", {}, 1, None, 1, {"128": 1.0, "8": 1.0, "32": 1.0})
    assert [row.label for row in comparison([model])][-3:] == [
        "latency, batch 8",
        "latency, batch 32",
        "latency, batch 128",
    ]


def test_what_a_form_lacks_is_a_dash() -> None:
    dense = ModelFigures("dense", {"accuracy": 0.5}, 10, 100, 1000, {"1": 0.1})
    other = ModelFigures("int8", {}, 10, None, 1000, {})
    rows = {row.label: row.cells[1] for row in comparison([dense, other])}
    assert [rows[name].value for name in ("accuracy", "MACs", "latency, batch 1")] == ["–", "–", "–"]
    assert all(rows[name].against_dense == "" for name in rows)


def test_a_run_ends_with_its_artifact_report_and_load_line_whole() -> None:
    uri = "s3://models/" + "very-long-prefix/" * 8 + "run?endpoint_override=127.0.0.1:8333&scheme=http"
    console = Console(file=io.StringIO(), width=80)
    print_result(console, summary(), uri, "/home/me/[bold]/report.html")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert f"{ARTIFACT_LABEL}{uri}" in lines
    assert "report    /home/me/[bold]/report.html" in lines
    assert f"load      import raycomp; model = raycomp.load('{uri}')" in lines
    assert any("3e−06" in line and "within the tolerance" in line for line in lines)
    assert any(line.startswith("warning: the loader") for line in lines)


def test_a_failed_verification_is_said() -> None:
    failed = replace(summary(), verification=Verification(0.5, 2.0, 0.25, 1e-4, (1, 8), False))
    console = Console(file=io.StringIO(), width=80)
    print_result(console, failed, "a", "b")
    assert "NOT within" in console.file.getvalue()  # type: ignore[attr-defined]


def test_files_with_size_and_hash() -> None:
    text = _shown(files_table({"model.onnx": (123_456, "ab" * 32), "a.json": (12, "0" * 64)}))
    assert _line(text, "model.onnx") == ["model.onnx", "123", "kB", "ab" * 8]
    assert text.index("a.json") < text.index("model.onnx")


def test_a_sweep_shows_the_best_first_and_failures_last() -> None:
    lines = _shown(sweep_table(trials(), "accuracy"), width=120).splitlines()
    order = [
        next(index for index, line in enumerate(lines) if name in line.split()) for name in ("t1", "t2", "t3", "t4")
    ]
    assert order == sorted(order)
    assert [("★" in lines[index]) for index in order] == [True, True, False, False]
    assert "loss is not finite at step 12" in " ".join(lines[order[3]].split())


LONG = "s3://models/compressed/digits/sweeps/20260101-000000-abcdef/trials/t1/artifacts/20260101-000000-abcdef"


@pytest.mark.parametrize("width", [60, 80])
def test_the_uris_of_a_sweep_come_unbroken_in_a_terminal_a_notebook_and_a_text(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = sweep_table([replace(trials()[0], artifact_uri=LONG)], "accuracy")
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(Visible(table), soft_wrap=True)
    assert f"t1  {LONG}\n" in console.file.getvalue()  # type: ignore[attr-defined]
    notebook = Console(width=width, force_jupyter=True)
    monkeypatch.setattr("rich.jupyter.get_console", lambda: notebook)
    assert LONG in table._repr_mimebundle_([], [])["text/plain"]
    monkeypatch.setenv("COLUMNS", str(width))
    assert LONG in str(table)


def test_an_artifact_is_quoted_for_a_shell() -> None:
    table = sweep_table([replace(trials()[0], artifact_uri="/my models/a")], "accuracy")
    assert "t1  '/my models/a'" in str(table)


@pytest.mark.parametrize("width", [60, 80])
def test_what_a_run_prints_to_paste_comes_unbroken(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_result(console, summary(), LONG, f"{LONG}/report.html")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert f"{ARTIFACT_LABEL}{LONG}" in lines and f"report    {LONG}/report.html" in lines
    assert f"load      import raycomp; model = raycomp.load({LONG!r})" in lines


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_form_and_figure_is_shown_whole_whatever_the_width(width: int) -> None:
    """Six forms side by side lost their labels and half of each number at 80 columns."""
    dense, *_, int8 = summary().models
    names = ["masked", "simulated", "sped-up", "sped-up simulated", "int8"]
    models = (dense, *(replace(int8, name=name) for name in names))
    text = _shown(result_table(replace(summary(), models=models)), width=width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert re.findall(r"sped-up simulated|sped-up|simulated|masked|dense|int8", text) == ["dense", *names]
    assert (text.count("32.0 kB  12.5×"), text.count("400 kB")) == (5, 1)
    assert text.count("latency, batch 32") == text.count("parameters") >= 1


def test_keys_are_cut_to_what_tells_them_apart() -> None:
    assert short_keys(["training.seed", "stages.0.x.sparse_ratio"]) == ["seed", "sparse_ratio"]
    assert short_keys(["stages.0.epochs", "stages.1.epochs"]) == ["0.epochs", "1.epochs"]
    assert short_keys([]) == []


def test_of_several_stages_each_that_cut_has_its_verification() -> None:
    pruned = Verification(3e-6, 20.0, 1.5e-7, 1e-4, (1, 8), True, "masked", -0.002, "prune")
    found = replace(summary(), earlier=(pruned,), verification=None)
    (first, passed), (second, _) = verification_texts(found)
    assert first.startswith("stage prune: sped-up against masked: ") and first.endswith("; accuracy −0.002.") and passed
    assert second == "sped-up: nothing was cut in the last stage, so it is the simulated model as it stands."
    assert RunSummary.from_json(found.to_json()).earlier == (pruned,)
    page = render_report(found)
    assert "stage prune: sped-up against masked" in page and "The forms are those of the last stage." in page
    assert "as large as dense" not in page and "as fast as dense" not in page
    assert "The forms are" not in render_report(summary())


def test_every_form_is_held_against_the_one_whose_function_it_should_have() -> None:
    """In one report two models were called simulated: the one that trained, and the one that speedup keeps."""
    found = replace(
        summary(),
        verification=Verification(3e-6, 20.0, 1.5e-7, 1e-4, (1, 8), True, "masked", 0.0),
        simulation=Simulation(58.5, 0.0003),
    )
    texts = [*(sentence for sentence, _ in verification_texts(found)), *rounding_texts(found)]
    assert [sentence.partition(":")[0] for sentence in texts] == [
        "sped-up against masked",
        "sped-up simulated against simulated",
        "int8 against sped-up simulated",
    ]
    assert texts[0].endswith("accuracy ±0.")
    assert texts[1].endswith("SQNR 58.5 dB; accuracy +0.0003.")
    assert texts[2].endswith("SQNR 38.25 dB; accuracy −0.001.")
