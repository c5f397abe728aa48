"""Job files: their YAML, and problems at their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycomp.config import load_job, parse_path, read_job, set_key
from raycomp.errors import ConfigError, Problem

GOOD = """\
name: digits
task:
  entrypoint: task.py:Digits
training: {epochs: 3, global_batch_size: 64}
stages:
  - name: fused
    compressors:
      - type: AGPPruner
        interval_steps: 20
        total_times: 5
        pruner:
          type: TaylorPruner
          training_steps: 10
          config_list:
            - op_types: [Conv2d]
              sparse_ratio: 0.5
speedup: {tolerance: 1e-4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def problems(file: Path, text: str | bytes) -> list[tuple[str, str, str]]:
    """Each problem as its line, with the key's path if there is one, its message and its remedy."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert all(problem.where.startswith(str(file)) for problem in caught.value.problems)
    return [(p.where.removeprefix(f"{file}:"), p.message, p.remedy) for p in caught.value.problems]


def test_a_good_file(file: Path) -> None:
    file.write_text(GOOD)
    job = load_job(file)
    assert job.speedup.tolerance == 1e-4
    assert job.stages[0].compressors[0].type == "AGPPruner"


def test_every_problem_at_once_in_the_order_of_lines(file: Path) -> None:
    text = """\
name: my job
task:
  entrypoint: task.py
trainning: {epochs: 3}
training: {epochs: three, steps: 5}
stages:
  - name: fused
    name: again
    compressors:
      - type: TaylorPruner
        config_list:
          - op_types: Conv2d
            sparse_ratio: 1.5
            sparse_threshold: 3
            sparse_rato: 3
  - name: fused
    speedup: yes
scaling:
"""
    assert problems(file, text) == [
        (
            "1 name",
            "got 'my job'",
            "should be a name of at most 63 letters, digits, '-', '_' and '.', that starts with a letter or a digit",
        ),
        ("3 task.entrypoint", "got 'task.py'", "should be 'package.module:Class' or 'path/to/file.py:Class'"),
        ("4 trainning", "unknown key 'trainning'", "did you mean 'training'?"),
        ("5 training.epochs", "got 'three'", "should be a whole number, at least 1"),
        ("5 training.steps", "epochs and steps exclude each other", "leave one of them out"),
        ("8 stages[0].name", "the key 'name' stands twice, first in line 7", "keep one"),
        (
            "10 stages[0].compressors[0].training_steps",
            "the key 'training_steps' is missing",
            "Optimizer steps over which the metric is gathered before a decision.",
        ),
        ("12 stages[0].compressors[0].config_list[0].op_types", "got 'Conv2d'", "should be a list"),
        (
            "13 stages[0].compressors[0].config_list[0].sparse_ratio",
            "got 1.5",
            "should be a number, at least 0 and below 1",
        ),
        (
            "14 stages[0].compressors[0].config_list[0].sparse_threshold",
            "sparse_ratio and sparse_threshold exclude each other",
            "leave one of them out",
        ),
        (
            "15 stages[0].compressors[0].config_list[0].sparse_rato",
            "unknown key 'sparse_rato'",
            "did you mean 'sparse_ratio'?",
        ),
        (
            "16 stages[1].compressors",
            "the key 'compressors' is missing",
            "The compressors, from the innermost to the outermost.",
        ),
        ("16 stages[1].name", "another stage is named 'fused', too", "names are unique"),
        ("17 stages[1].speedup", "got 'yes'", "should be true or false"),
        ("18 scaling", "got null", "should be a mapping of keys to values"),
    ]


def test_the_error_prints_one_line_per_problem(file: Path) -> None:
    file.write_text(GOOD.replace("epochs: 3", "epochs: 0").replace("0.5", "1.5"))
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert str(caught.value) == (
        f"{file}:4 training.epochs: got 0 (should be a whole number, at least 1)\n"
        f"{file}:16 stages[0].compressors[0].pruner.config_list[0].sparse_ratio: "
        "got 1.5 (should be a number, at least 0 and below 1)"
    )


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", "1", "it is empty"),
        ("# nothing\n", "1", "it is empty"),
        ("- a\n- b\n", "1", "got a list"),
        ("just text", "1", "got 'just text'"),
        ("name: a\n\ttask: b\n", "2", "it is not YAML: "),
        ("name: [a\ntask: b\n", "2", "it is not YAML: "),
        ("name: a\n---\nname: b\n", "2", "it is not YAML: "),
        ("name: a\nname: b\n---\n", "3", "it is not YAML: "),
        ("name: *anchor\n", "1", "it is not YAML: "),
        (b"name: \xff\xfe\n", "", "it is not a text file"),
        (b"name: a\nb\x00b\n", "2", "it is not YAML: the character 0x0 can't stand there"),
    ],
)
def test_files_that_are_no_job(file: Path, text: str | bytes, where: str, message: str) -> None:
    ((found, told, _),) = problems(file, text)
    assert found == (where or str(file))
    assert told.startswith(message)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1: x", "the key 1 is not a text"),
        ("true: x", "the key true is not a text"),
        ("? [a]\n: x", "the key ... is not a text"),
        ("cluster: !!python/object:os.system {}", "unknown type 'tag:yaml.org,2002:python/object:os.system'"),
        ("cluster: !!set {address}", "unknown type 'tag:yaml.org,2002:set'"),
        ("cluster: {num_cpus: !!bool maybe}", "'maybe' is not of type bool"),
        ("cluster: {num_cpus: !!int ''}", "'' is not of type int"),
        ("cluster: !!python/name:os.system x", "unknown type 'tag:yaml.org,2002:python/name:os.system'"),
        ("cluster: !!timestamp 2024-01-01", "unknown type"),
        ("cluster: &me {address: *me}", "it holds itself"),
        ("<<: 3", "'<<' takes a mapping"),
    ],
)
def test_yaml_beyond_plain_data_is_refused(file: Path, line: str, message: str) -> None:
    found = problems(file, GOOD + line + "\n")
    assert found[0][0].startswith("18")
    assert found[0][1].startswith(message)


def test_scalars_are_those_of_yaml_1_2(file: Path) -> None:
    values = "[1e-4, 1E3, .5, -2, 0x1F, on, no, yes, 010, 12:30, 2024-01-01, 1_000, null, ~, true, FALSE, .inf]"
    file.write_text(f"values: {values}\n")
    raw, _ = read_job(file)
    assert raw["values"] == [
        *(1e-4, 1000.0, 0.5, -2, 31),
        *("on", "no", "yes", "010", "12:30", "2024-01-01", "1_000"),
        *(None, None, True, False, float("inf")),
    ]


def test_anchors_and_merges(file: Path) -> None:
    text = """\
base: &base {a: 1, b: 2}
plain: *base
merged:
  <<: *base
  b: 3
  c: 4
several: {<<: [{a: 5}, *base]}
"""
    file.write_text(text)
    raw, source = read_job(file)
    assert raw["plain"] == {"a": 1, "b": 2}
    assert raw["merged"] == {"a": 1, "b": 3, "c": 4}
    assert raw["several"] == {"a": 5, "b": 2}
    assert source.locate(("merged", "b")) == f"{file}:5 merged.b"
    assert source.locate(("merged", "a")) == f"{file}:1 merged.a"


def test_locations(file: Path) -> None:
    file.write_text(GOOD)
    _, source = read_job(file)
    assert source.locate(("stages", 0, "compressors", 0, "pruner", "type")) == (
        f"{file}:12 stages[0].compressors[0].pruner.type"
    )
    assert source.locate(("stages", 0, "compressors", 0, "missing", "deeper")) == (
        f"{file}:8 stages[0].compressors[0].missing.deeper"
    )
    assert source.locate(()) == f"{file}:1"


def test_problems_found_later_are_located(file: Path) -> None:
    file.write_text(GOOD)
    _, source = read_job(file)
    op_types = "stages[0].compressors[0].pruner.config_list[0].op_types[0]"
    error = ConfigError(
        [Problem(op_types, "no module is a 'Conv2d'", "did you mean 'Linear'?"), Problem("elsewhere", "x")]
    )
    first, second = source.located(error).problems
    assert first == Problem(f"{file}:15 {op_types}", "no module is a 'Conv2d'", "did you mean 'Linear'?")
    assert second.where == "elsewhere"


def test_read_job_refuses_a_key_that_stands_twice(file: Path) -> None:
    file.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(ConfigError, match=r"job.yaml:3 a: the key 'a' stands twice, first in line 1"):
        read_job(file)


def test_a_missing_file_names_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").touch()
    with pytest.raises(ConfigError, match=r"there is no such file \('.*' has other.yaml\)"):
        load_job(tmp_path / "job.yaml")
    with pytest.raises(ConfigError, match="there is no folder"):
        load_job(tmp_path / "nowhere" / "job.yaml")
    with pytest.raises(ConfigError, match="it can't be read: Is a directory"):
        load_job(tmp_path)


def test_parse_path_reads_both_spellings() -> None:
    assert parse_path("stages[0].compressors[10].type") == ("stages", 0, "compressors", 10, "type")
    assert parse_path("stages.0.compressors.10.type") == ("stages", 0, "compressors", 10, "type")


@pytest.mark.parametrize(
    "text", ["training..epochs", "stages]0[", "a.", ".a", "stages[0", "a]", "a[0]b", "a[].b", "a[x]", "a[00]", ".", ""]
)
def test_what_only_looks_like_a_path_names_nothing(text: str) -> None:
    assert parse_path(text) == ()


def test_set_key_changes_a_copy(file: Path) -> None:
    file.write_text(GOOD)
    raw, _ = read_job(file)
    changed = set_key(raw, "stages.0.compressors.0.pruner.config_list.0.sparse_ratio", 0.25)
    entry = changed["stages"][0]["compressors"][0]["pruner"]["config_list"][0]
    assert entry == {"op_types": ["Conv2d"], "sparse_ratio": 0.25}
    assert raw["stages"][0]["compressors"][0]["pruner"]["config_list"][0]["sparse_ratio"] == 0.5
    assert set_key(raw, "training.seed", 3)["training"] == {"epochs": 3, "global_batch_size": 64, "seed": 3}
    assert set_key(raw, "int8.reduce_range", True)["int8"] == {"reduce_range": True}
    assert set_key(raw, "task.arguments.width", 8)["task"]["arguments"] == {"width": 8}
    assert set_key(raw, "stages[0].name", "x")["stages"][0]["name"] == "x"


def test_set_key_leaves_wrong_values_to_the_job(file: Path) -> None:
    file.write_text(GOOD)
    raw, _ = read_job(file)
    assert set_key(raw, "training.steps", 5)["training"]["steps"] == 5


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("training.sed", "did you mean 'seed'?"),
        ("trainig.seed", "did you mean 'training'?"),
        ("stages.3.name", "the list has 1 items"),
        ("stages.first.name", "it is a list: a number below 1 comes here"),
        ("name.first", "there is 'digits' already"),
        ("training.0", "it is a mapping: a key comes here"),
        ("stages.0.compressors.0.pruner.config_list.0.sparse_rato", "did you mean 'sparse_ratio'?"),
        ("training..epochs", "write a path of keys such as training.seed or stages[0].training.epochs"),
        ("stages]0[", "write a path of keys such as training.seed or stages[0].training.epochs"),
        ("", "write a path of keys such as training.seed or stages[0].training.epochs"),
    ],
)
def test_set_key_refuses_what_a_job_does_not_have(file: Path, key: str, told: str) -> None:
    file.write_text(GOOD)
    raw, _ = read_job(file)
    with pytest.raises(ConfigError) as caught:
        set_key(raw, key, 1)
    assert caught.value.problems[0].remedy == told
