"""Job files that are meant to hurt, or were hurt: one error with file, line and remedy, and soon."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from raycomp.config import load_job_file, parse_job, read_job, read_value
from raycomp.config.sweep_plan import load_sweep
from raycomp.errors import ConfigError, Problem

JOB = """\
name: digits
task: {entrypoint: task.py:Digits, arguments: {width: 8}}
training: {epochs: 3, seed: 0, global_batch_size: 64}
stages:
  - name: fused
    compressors:
      - type: L1NormPruner
        config_list:
          - {op_types: [Conv2d], sparse_ratio: 0.5}
scaling: {num_workers: 2}
storage: {uri: artifacts}
"""
SWEEP = """\
job: job.yaml
search:
  training.seed: {grid: [0, 1]}
  training.epochs: {randint: [1, 4]}
num_samples: 2
"""


def only_problem(file: Path, text: str) -> Problem:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job_file(file)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("old", "new", "place", "message", "remedy"),
    [
        ("name: digits", 'name: "\\U00110000"', "1", "it is not YAML: there is no such character", "escapes go up to"),
        ("artifacts", '"a\\0b"', "11 storage.uri", "got 'a\\x00b'", "without control characters"),
        ("artifacts", "~nosuchuser/x", "11 storage.uri", "there is no user 'nosuchuser'", "write ./~nosuchuser"),
        ("artifacts", '"gs://b/x?foo=1"', "11 storage.uri", "unknown option 'foo'", "choose from endpoint_override"),
        ("artifacts", '"file:///x?foo=1"', "11 storage.uri", "unknown option 'foo'", "there is none to choose from"),
        ("seed: 0", "seed: 18446744073709551616", "3 training.seed", "got 18446744073709551616", "at most"),
        ("num_workers: 2", "num_workers: 1000000000", "10 scaling.num_workers", "got 1000000000", "at most 10000"),
        ("{width: 8}", "{width: .inf}", "2 task.arguments.width", "got inf", "finite numbers"),
        ("Conv2d]", "Conv2d], target_names: []", "9 stages[0].compressors[0].config_list[0].target_names", "empty", ""),
        ("name: digits", 'name: digits\n"a\\nb\\x1b": 1', "2 a\\nb\\x1b", "unknown key 'a\\nb\\x1b'", "choose from"),
        ("size: 64", "size: " + "9" * 5000, "3 training.global_batch_size", "'9999", "of this type"),
    ],
)  # fmt: skip
def test_one_error_with_line_and_remedy(
    tmp_path: Path, old: str, new: str, place: str, message: str, remedy: str
) -> None:
    assert JOB.count(old) == 1
    problem = only_problem(tmp_path / "job.yaml", JOB.replace(old, new))
    assert problem.where == f"{tmp_path}/job.yaml:{place}"
    assert message in problem.message and len(problem.message) < 200
    assert remedy in problem.remedy


@pytest.mark.parametrize("key", ["compressors", "config_list", "stages"])
def test_an_empty_list_is_told_at_its_key(tmp_path: Path, key: str) -> None:
    lines = JOB.splitlines()
    (at,) = (index for index, line in enumerate(lines) if line.strip() == f"{key}:")
    indent = len(lines[at]) - len(lines[at].lstrip())
    inside = [index for index in range(at + 1, 9) if len(lines[index]) - len(lines[index].lstrip()) > indent]
    kept = [line for index, line in enumerate(lines) if index not in inside]
    kept[at] += " []"
    problem = only_problem(tmp_path / "job.yaml", "\n".join(kept))
    assert problem.where.startswith(f"{tmp_path}/job.yaml:{at + 1} ") and problem.where.endswith(key)
    assert (problem.message, problem.remedy) == ("it is empty", "at least 1 needed")


def test_aliases_that_multiply_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    problem = only_problem(tmp_path / "job.yaml", bomb + JOB)
    assert "more than 50,000 values" in problem.message and problem.remedy == "repeat less"


def test_a_chain_of_aliases_is_as_deep_as_brackets_are(tmp_path: Path) -> None:
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 900))
    assert "more than 50 levels" in only_problem(tmp_path / "job.yaml", chain + JOB).message
    for brackets in (500, 5000):
        problem = only_problem(tmp_path / "job.yaml", JOB + f"x: {'[' * brackets}{']' * brackets}\n")
        assert problem.where == f"{tmp_path}/job.yaml:12"
        assert problem.message.startswith("it is nested more than 50 levels deep")


def test_no_more_is_read_than_a_job_can_have(tmp_path: Path) -> None:
    assert "longer than 200,000 bytes" in only_problem(tmp_path / "job.yaml", JOB + "#" * 200_000).message
    with pytest.raises(ConfigError, match="longer than"):
        read_job("/dev/zero")


def test_the_same_limits_hold_for_a_single_value() -> None:
    assert read_value("1e-3", "--set x") == 1e-3 and read_value("", "--set x") is None
    with pytest.raises(ConfigError) as caught:
        read_value("[" * 500, "--set x")
    assert caught.value.problems[0].where == "--set x"


def test_texts_from_python_are_held_to_the_same() -> None:
    with pytest.raises(ConfigError, match="finite numbers"):
        parse_job({"name": "a", "task": {"entrypoint": "t.py:T", "arguments": {"x": "\ud800"}}})


def test_a_sweep_of_more_trials_than_anyone_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP.replace("num_samples: 2", "num_samples: 1000000000"))
    with pytest.raises(ConfigError, match=r"sweep.yaml:2 search: it makes 2,000,000,000 trials"):
        load_sweep(file)


def test_a_sweep_names_its_own_line_for_a_job_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    with pytest.raises(ConfigError, match=r"sweep.yaml:1 job: got 'job.yaml': there is no such file"):
        load_sweep(tmp_path / "sweep.yaml")


VALUES = (
    "~", "[]", "{}", '""', "-1", ".inf", ".nan", "9" * 30, '"\\0"', '"\\ud800"', '"\\U00110000"', "[[[]]]", "*x",
    "&x [*x]", "!!python/object:os.system {}", "!!int x", "true", '"s3://["', '"~nosuch/x"', "'", "{", "[", "|", "\0",
    "%YAML 9.9", "---", "!!binary x", "!!set {a}", "0x" + "F" * 400, "- - -", "? [a]: b", "<<: 1", "[null]", "a: b",
)  # fmt: skip


def mutant(generator: random.Random, text: str) -> str:
    """The text with one to three things wrong: a value, a cut, a line twice or gone, another character."""
    for _ in range(generator.randint(1, 3)):
        kind, start = generator.randrange(4), generator.randrange(len(text))
        if kind == 0:
            text = text[:start] + generator.choice(VALUES) + text[start:]
        elif kind == 1:
            text = text[:start] + text[start + generator.randint(1, 20) :]
        elif kind == 2:
            lines = text.split("\n")
            at = generator.randrange(len(lines))
            lines[at] = re.sub(r": .*", lambda _: f": {generator.choice(VALUES)}", lines[at], count=1)
            text = "\n".join(lines)
        else:
            text = text[:start] + chr(generator.choice([0, 9, 27, 35, 58, 91, 123, 255, 0x2028])) + text[start + 1 :]
        text = text or "x"
    return text


@pytest.mark.parametrize("name", ["job.yaml", "sweep.yaml"])
def test_every_mutant_is_right_or_told_with_its_place(tmp_path: Path, name: str) -> None:
    generator, right = random.Random(0), 0
    (tmp_path / "job.yaml").write_text(JOB)
    file, load, base = tmp_path / name, *((load_job_file, JOB) if name == "job.yaml" else (load_sweep, SWEEP))
    for _ in range(150):
        file.write_text(mutant(generator, base))
        try:
            load(file)
            right += 1
        except ConfigError as error:
            assert error.problems
            for problem in error.problems:
                assert re.match(rf"{re.escape(str(tmp_path))}/\w+\.yaml:\d+", problem.where), problem
                assert problem.message
    assert 0 < right < 150
