from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from raycomp.report import render_report, render_sweep
from raycomp.report import write_report as write
from raycomp.report.sections import outcome, timeline
from raycomp.results.summary import Int8Figures, ModelFigures, RunSummary, Verification
from tests.report.summaries import summary, trials

_VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Text of a page by its sections; fails where tags don't close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, str] = {"": ""}
        self.links: list[str] = []
        self._title = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag in _VOID:
            return
        self.open.append(tag)
        if tag == "h2":
            self._title = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open[-1:] == ["h2"]:
            self._title = data
            self.sections[data] = ""
        else:
            self.sections[self._title] = self.sections.get(self._title, "") + " " + data


def _sections(shown: RunSummary) -> dict[str, str]:
    found = Page(render_report(shown)).sections
    return {title: " ".join(text.split()) for title, text in found.items()}


def test_the_page_has_every_part_and_is_well_formed() -> None:
    assert list(_sections(summary())) == [
        "",
        "Result",
        "What was run",
        "Is the sped-up model the same function?",
        "Integer arithmetic",
        "Training",
        "Layers",
        "Left in place",
        "Time",
        "Environment",
        "Job file",
    ]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = render_report(summary())
    assert Page(html).links == []
    assert not re.search(r"url\(|@import|<script|<link|http://|https://", html)


def test_the_page_suits_dark_mode_and_phones() -> None:
    html = render_report(summary())
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_the_outcome_says_what_was_gained_and_what_it_cost() -> None:
    assert outcome(summary()) == (
        "The int8 model, against the dense one it was made from: 4.00× fewer MACs and 12.5× smaller on disk. "
        "Accuracy 0.984 against 0.99."
    )


def test_the_outcome_does_not_call_a_larger_model_smaller() -> None:
    dense = ModelFigures("dense", {}, 10, 100, 1000)
    larger = replace(summary(), models=(dense, ModelFigures("sped-up", {}, 10, 50, 2000)))
    assert "2.00× fewer MACs and 2.00× larger on disk" in outcome(larger)


def test_results_and_their_ratios() -> None:
    result = _sections(summary())["Result"]
    assert "MACs 4.00 M 4.00 M 1.00 M 4.00× 1.00 M 4.00×" in result
    assert "raycomp.load('s3://models/digits-fused/artifacts/20260102-030405-ab12')" in result


def test_what_was_run_is_read_from_the_job() -> None:
    run = _sections(summary())["What was run"]
    assert "AGPPruner over TaylorPruner (50.0 %) QATQuantizer (int8)" in run
    assert "4 epochs, global batches of 128, seed 7" in run
    assert "Workers 2" in run


def test_the_job_file_says_where_it_runs_again() -> None:
    """It names its task relative to itself, or names what Python gave."""
    job = "name: a\ntask: {entrypoint: '%s'}\nstages: []\n"
    of_file, given = (
        _sections(replace(summary(), config_yaml=job % entrypoint))["Job file"]
        for entrypoint in ("tasks/digits.py:Digits", "__main__:MyTask")
    )
    assert "Save it as job.yaml where tasks/digits.py is relative to it; raycomp run job.yaml runs it again" in of_file
    assert 'CompressionJob("job.yaml", task=…) where Python gave it' in given


def test_verification_and_int8_are_explained() -> None:
    sections = _sections(summary())
    assert sections["Is the sped-up model the same function?"].startswith(
        "verified sped-up against simulated: greatest difference"
    )
    int8 = sections["Integer arithmetic"]
    assert "38.25 dB, of its outputs against the simulated model" in int8
    assert "no VNNI" in int8 and "held to 7 bits" in int8 and "25.0 % of the 80.0 kB" in int8


def test_vnni_and_failed_verification_read_otherwise() -> None:
    other = replace(
        summary(),
        int8=Int8Figures(40.0, 0.0, 1, 4, True, False, layers=1),
        verification=Verification(0.5, 2.0, 0.25, 1e-4, (1, 8), False),
    )
    sections = _sections(other)
    assert "has VNNI" in sections["Integer arithmetic"] and "7 bits" not in sections["Integer arithmetic"]
    assert sections["Is the sped-up model the same function?"].startswith("not verified")


def test_layers_show_channels_before_and_after() -> None:
    layers = _sections(summary())["Layers"]
    assert "stem. conv 16 → 8 50.0 % Conv2d int8" in layers
    assert "up 24 → 12 50.0 % ConvTranspose2d float" in layers, "a transposed convolution's outputs stand second"
    assert "head 10 – Linear float" in layers


def test_what_stayed_is_named_with_its_reason() -> None:
    assert "block2. norm 0 3 a padded convolution reads its constant <0.25>" in _sections(summary())["Left in place"]
    assert _sections(replace(summary(), unpruned=()))["Left in place"].startswith("Nothing")


def test_time_adds_up() -> None:
    assert _sections(summary())["Time"].startswith("76.0 s in all.")


def test_text_of_the_user_is_escaped() -> None:
    evil = replace(
        summary(), job="<script>alert(1)</script>", warnings=("<img src=x>",), config_yaml="name: '</code><b>'"
    )
    assert Page(render_report(evil)).links == []
    assert "<script>" not in render_report(evil)


def test_steps_count_through_all_stages() -> None:
    steps, marks = timeline(summary().history)
    assert steps == [float(step) for step in range(5, 201, 5)]
    assert [(mark.x, mark.label) for mark in marks] == [(0, "prune"), (100, "distil")]


def test_a_run_that_measured_nothing_still_has_a_report(tmp_path: Path) -> None:
    bare = RunSummary("job", "run", "2026-01-01T00:00:00Z", ())
    write(bare, tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).sections.keys() == {""}


def test_a_sweep_has_its_front_and_all_trials() -> None:
    html = render_sweep("digits", trials(), "accuracy")
    page = Page(html)
    assert html.count('class="on-front"') == 2 and html.count('class="dominated"') == 1
    trials_text = " ".join(page.sections["Trials"].split())
    assert "★ t1 0.25 0 0.99 3.00 M 90.0 kB artifacts/t1" in trials_text
    assert "t4 0.9 0 – – – loss is not finite at step 12" in trials_text
