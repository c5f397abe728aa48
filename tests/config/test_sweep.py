"""Sweep files: the search space, its draws, and every trial's job checked beforehand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from raycomp.config.sweep import SweepConfig
from raycomp.config.sweep_plan import SweepPlan, load_sweep, parse_sweep
from raycomp.errors import ConfigError

JOB = """\
name: tiny
task:
  entrypoint: task.py:Tiny
training: {epochs: 3, global_batch_size: 64}
stages:
  - name: prune
    compressors:
      - type: L1NormPruner
        config_list:
          - op_types: [Conv2d]
            sparse_ratio: 0.5
"""
RATIO = "stages.0.compressors.0.config_list.0.sparse_ratio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def planned(folder: Path, search: dict[str, Any], **settings: Any) -> SweepPlan:
    return parse_sweep({"job": "job.yaml", "search": search, **settings}, folder)


def problems(folder: Path, text: str) -> list[tuple[str, str, str]]:
    """Each problem as its line and key, its message and its remedy."""
    file = folder / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_sweep(file)
    return [(p.where.removeprefix(f"{file}:"), p.message, p.remedy) for p in caught.value.problems]


def test_grids_are_crossed_in_the_order_of_the_file(folder: Path) -> None:
    plan = planned(folder, {RATIO: {"grid": [0.25, 0.5]}, "training.seed": {"grid": [0, 7]}})
    assert [(trial.id, *trial.settings.values()) for trial in plan.trials] == [
        ("00", 0.25, 0),
        ("01", 0.25, 7),
        ("02", 0.5, 0),
        ("03", 0.5, 7),
    ]
    last = plan.trials[3].job
    assert last.training.seed == 7
    assert last.stages[0].compressors[0].config_list[0].sparse_ratio == 0.5
    assert plan.job.training.seed == 0
    assert plan.base_dir == folder


def test_draws_are_repeatable_and_in_their_ranges(folder: Path) -> None:
    search = {
        RATIO: {"uniform": [0.2, 0.4]},
        "speedup.tolerance": {"loguniform": [1e-6, 1e-2]},
        "training.seed": {"randint": [3, 6]},
        "training.epochs": {"choice": [1, 2]},
    }
    plan = planned(folder, search, num_samples=200, seed=1)
    drawn = [list(trial.settings.values()) for trial in plan.trials]
    assert len(drawn) == 200
    ratios, tolerances, seeds, epochs = zip(*drawn)
    assert 0.2 <= min(ratios) < 0.22 and 0.38 < max(ratios) < 0.4
    assert {round(math.log10(value)) for value in tolerances} == {-6, -5, -4, -3, -2}
    assert sum(value < 1e-4 for value in tolerances) in range(70, 131)
    assert set(seeds) == {3, 4, 5}
    assert set(epochs) == {1, 2}
    again = planned(folder, search, num_samples=200, seed=1)
    assert again.digest() == plan.digest()
    assert planned(folder, search, num_samples=200, seed=2).digest() != plan.digest()


def test_each_draw_meets_all_grids_and_equal_draws_are_one_trial(folder: Path) -> None:
    search = {"training.epochs": {"grid": [1, 2]}, RATIO: {"uniform": [0.1, 0.9]}}
    trials = planned(folder, search, num_samples=3).trials
    assert [trial.settings["training.epochs"] for trial in trials] == [1, 2] * 3
    assert len({trial.settings[RATIO] for trial in trials}) == 6
    few = planned(folder, {"training.seed": {"choice": [1, 2]}}, num_samples=50).trials
    assert sorted(str(trial.settings["training.seed"]) for trial in few) == ["1", "2"]


def test_an_inline_job_and_a_settings_object(tmp_path: Path) -> None:
    import yaml

    config = SweepConfig(job=yaml.safe_load(JOB), search={RATIO: {"grid": [0.25]}})
    plan = parse_sweep(config, tmp_path)
    assert plan.job.name == "tiny"
    assert plan.trials[0].settings == {RATIO: 0.25}
    assert plan.base_dir == tmp_path


def test_a_whole_config_list_can_be_a_value(folder: Path) -> None:
    lists = [[{"op_types": ["Linear"], "sparse_ratio": 0.1}], [{"op_names": ["fc"], "sparse_ratio": 0.2}]]
    trials = planned(folder, {"stages.0.compressors.0.config_list": {"grid": lists}}).trials
    assert [trial.job.stages[0].compressors[0].config_list[0].sparse_ratio for trial in trials] == [0.1, 0.2]


def test_everything_wrong_with_the_settings_at_once(folder: Path) -> None:
    text = """\
job: jbo.yaml
search:
  training.epochs: {uniform: [2, 1]}
  training.seed: {}
  scaling: {grid: [1], choice: [2]}
  storage.uri: {grid: [a]}
  speedup.tolerance: {loguniform: [0, 1]}
  "training": {grid: [{epochs: 1}]}
num_sampls: 3
mode: least
"""
    found = problems(folder, text)
    assert ("3 search.training.epochs.uniform", "got [2, 1]", "should be two numbers that rise: [low, high]") in found
    assert (
        "4 search.training.seed",
        "it gives no values",
        "exactly one of grid, choice, uniform, loguniform, randint",
    ) in found
    assert found[2][0] == "5 search.scaling.choice"
    assert ("6 search.storage.uri", "a sweep sets storage itself", "search another key") in found
    assert (
        "7 search.speedup.tolerance.loguniform",
        "got [0, 1]",
        "should be two numbers above 0 that rise: [low, high]",
    ) in found
    assert ("8 search.training", "it sets what 'training.epochs' sets, too", "leave one of them out") in found
    assert ("9 num_sampls", "unknown key 'num_sampls'", "did you mean 'num_samples'?") in found
    assert ("10 mode", "got 'least'", "should be 'max' or 'min'") in found
    assert any("there is no such file" in message for _, message, _ in found)


def test_each_wrong_value_is_named_at_its_line(folder: Path) -> None:
    text = f"""\
job: job.yaml
search:
  {RATIO}:
    grid:
      - 0.3
      - 1.5
  training.sed: {{choice: [0]}}
  training.epochs: {{randint: [0, 4]}}
  training.steps: {{grid: [3]}}
"""
    assert problems(folder, text) == [
        (f"6 search.{RATIO}.grid[1]", "got 1.5", "should be a number, at least 0 and below 1"),
        ("7 search.training.sed", "a job has no key training.sed", "did you mean 'seed'?"),
        ("8 search.training.epochs.randint[0]", "got 0", "should be a whole number, at least 1"),
        ("9 search.training.steps.grid[0]", "epochs and steps exclude each other", "leave one of them out"),
    ]


def test_a_key_that_is_no_path_is_told_at_its_line(folder: Path) -> None:
    text = """\
job: job.yaml
search:
  training..epochs: {grid: [1, 2]}
  "stages]0[": {grid: [1, 2]}
  "train\\ning": {grid: [1, 2]}
"""
    path = "write a path of keys such as training.seed or stages[0].training.epochs"
    assert sorted(problems(folder, text)) == [
        ("3 search.training..epochs", "it is no path of keys", path),
        ("4 search.stages]0[", "it is no path of keys", path),
        ("5 search.train\\ning", "got 'train\\ning'", "should be a text that is not empty, without control characters"),
    ]


def test_the_ends_of_a_range_are_checked(folder: Path) -> None:
    planned(folder, {RATIO: {"uniform": [0.0, 1.0]}})
    with pytest.raises(ConfigError, match=r"sweep\.search\..*uniform\[1\]: got 1\.09"):
        planned(folder, {RATIO: {"uniform": [0.0, 1.1]}})


def test_values_that_are_wrong_together(folder: Path) -> None:
    search = {"training.global_batch_size": {"grid": [32, 8]}, "training.gradient_accumulation": {"grid": [1, 16]}}
    with pytest.raises(ConfigError) as caught:
        planned(folder, search)
    (problem,) = caught.value.problems
    assert problem.message.startswith(
        "with training.global_batch_size=8, training.gradient_accumulation=16: training.gradient_accumulation: "
    )


def test_problems_of_the_job_have_the_job_files_lines(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB.replace("epochs: 3", "epochs: three"))
    found = problems(folder, "job: job.yaml\nsearch: {training.seed: {grid: [1]}}\n")
    assert [(where, message) for where, message, _ in found] == [
        (f"{folder / 'job.yaml'}:4 training.epochs", "got 'three'")
    ]


def test_problems_of_an_inline_job_have_the_sweep_files_lines(folder: Path) -> None:
    text = "job:\n" + "".join(f"  {line}\n" for line in JOB.splitlines()).replace("name: tiny", "name: a b")
    found = problems(folder, text + "search: {training.seed: {grid: [1]}}\n")
    assert [(where, message) for where, message, _ in found] == [("2 job.name", "got 'a b'")]


def test_a_repeated_grid_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="num_samples: a grid repeated gives the same trials"):
        planned(folder, {"training.seed": {"grid": [1, 2]}}, num_samples=2)
