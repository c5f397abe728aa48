from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from raycomp.errors import ArtifactError
from raycomp.results.summary import Int8Figures, RunSummary
from tests.report.summaries import summary


def test_json_gives_the_same_summary_back() -> None:
    # The history holds a loss that is not a number, which equals nothing: its events are compared by their text.
    first = summary()
    again = RunSummary.from_json(first.to_json())
    assert replace(again, history=()) == replace(first, history=())
    assert repr(again.history) == repr(first.history)


def test_json_is_standard_also_where_figures_are_not_finite() -> None:
    exact = replace(summary(), int8=Int8Figures(math.inf, 0.0, 1, 4, True, False))
    text = exact.to_json()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(text, parse_constant=refuse)
    assert RunSummary.from_json(text).int8 == exact.int8
    assert any(math.isnan(event.loss) for event in RunSummary.from_json(text).history)


def test_figures_of_a_manifest_give_the_results_back() -> None:
    first = summary()
    figures = json.loads(json.dumps(first.figures(), allow_nan=False))
    again = RunSummary.from_figures(figures, job=first.job, run=first.run, created=first.created)
    assert (again.models, again.verification, again.int8) == (first.models, first.verification, first.int8)
    assert (again.unpruned, again.timings, again.warnings) == (first.unpruned, first.timings, first.warnings)
    assert "history" not in figures and "config_yaml" not in figures


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"job": "a", "run": "b", "created": "c", "models": [{}]}'])
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a run's summary"):
        RunSummary.from_json(text)


def test_figures_of_something_else_name_the_place() -> None:
    with pytest.raises(ArtifactError) as caught:
        RunSummary.from_figures({"models": [{"name": "dense"}]}, job="a", run="b", created="c")
    assert caught.value.where == "manifest.json" and "models[0].metrics" in caught.value.message
