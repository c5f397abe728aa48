"""What comes first in a result: that int8 is slow, that its outputs are wrong, that layers compute in float."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from raycomp.report import print_result, render_report
from raycomp.report.outcome import doubts, outcome
from raycomp.results.summary import RunSummary
from tests.report.summaries import summary


def with_int8(**changes: object) -> RunSummary:
    found = summary()
    assert found.int8 is not None
    return replace(found, int8=replace(found.int8, **changes))  # type: ignore[arg-type]


def slow() -> RunSummary:
    """With batches of 1 alone: 0.5 against 0.4 ms."""
    found = summary()
    *others, int8 = found.models
    return replace(found, models=(*others, replace(int8, latency_s={"1": 0.0005, "32": 0.002})))


def printed(shown: RunSummary) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    print_result(console, shown, "artifacts/x", "report.html")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line for line in text.splitlines() if line.strip()]


def test_int8_that_is_slower_than_float_says_so_in_the_first_line() -> None:
    told = "On this machine int8 is slower than the sped-up model in float: 500 µs against 400 µs with batch 1."
    assert outcome(slow()).endswith(told)
    assert printed(slow())[0].endswith(told)
    assert "is slower than" not in outcome(summary())


def test_a_low_sqnr_is_a_warning_in_the_first_lines() -> None:
    shown = with_int8(sqnr_db=9.5)
    assert "SQNR 9.5 dB, below 10" in printed(shown)[1]
    page = render_report(shown)
    assert page.index("SQNR 9.5 dB, below 10") < page.index("Result</h2>")
    assert doubts(with_int8(sqnr_db=10.5)) == ()


def test_layers_in_float_are_listed_with_their_cause_and_nothing_says_otherwise() -> None:
    cause = "its output has no scale: add `_output_` to its target_names"
    some = render_report(with_int8(layers=3, float_layers={"stem.conv": cause}, vnni=True))
    assert "1 of its 3 quantized layers compute in float" in some and cause in some
    every = with_int8(layers=1, float_layers={"stem.conv": cause}, vnni=True)
    page = render_report(every)
    assert "No layer computes with integers" in page and "exact and fast" not in page
    assert outcome(every).endswith(" No layer of it computes with integers.")
    told = f"the int8 model computes everything in float: stem.conv: {cause}"
    assert doubts(every) == (told,) and printed(every)[1] == f"warning: {told}"
    assert "SQNR 38.25 dB; accuracy −0.001; 1 of its 1 quantized layers compute in float." in "\n".join(printed(every))


def test_an_int8_model_without_integer_weights_is_no_int8_model_and_told_what_to_do() -> None:
    (told,) = doubts(with_int8(layers=0))
    assert told.startswith("the int8 model computes everything in float: no weight is stored in integers; quantize")
    assert "VNNI" not in render_report(with_int8(layers=0)).split("Integer arithmetic</h2>")[1].split("<h2>")[0]


def test_a_run_that_cut_nothing_says_what_its_sped_up_model_is() -> None:
    shown = replace(summary(), verification=None, unpruned=())
    assert "sped-up: nothing was cut, so it is the simulated model as it stands." in printed(shown)
    assert "nothing was cut, so it is the simulated model as it stands" in render_report(shown)


def test_a_model_as_large_as_dense_is_not_said_to_be_faster() -> None:
    """Two times of one model differ by chance."""
    found = summary()
    dense, simulated, sped_up, _ = found.models
    unchanged = replace(sped_up, parameters=dense.parameters, macs=dense.macs)
    assert "faster than dense, batch 32" in render_report(replace(found, int8=None, models=(dense, simulated, sped_up)))
    assert "faster than dense" not in render_report(replace(found, int8=None, models=(dense, simulated, unchanged)))
