"""Config-list entries: what they take, what they refuse, and how settings reach a target."""

from __future__ import annotations

from typing import Any

import pytest

from raycomp.config import DistillEntry, PruneEntry, PruneTarget, QuantizeEntry, QuantizeTarget, parse_config_list
from raycomp.errors import ConfigError, Problem


def problems(kind: Any, *entries: object) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_config_list(kind, list(entries))
    return list(caught.value.problems)


def test_top_level_keys_are_shortcuts_that_target_settings_override() -> None:
    (entry,) = parse_config_list(
        "pruner",
        [
            {
                "op_types": ["Linear"],
                "target_names": ["weight", "bias"],
                "sparse_ratio": 0.5,
                "max_sparse_ratio": 0.8,
                "target_settings": {"bias": {"sparse_ratio": 0.25, "align": {"target_name": "weight", "dims": [0]}}},
            }
        ],
    )
    assert entry.settings_for("weight") == PruneTarget(sparse_ratio=0.5, max_sparse_ratio=0.8)
    bias = entry.settings_for("bias")
    assert (bias.sparse_ratio, bias.max_sparse_ratio, bias.align and bias.align.dims) == (0.25, 0.8, (0,))
    assert entry.settings_for("weight").model_fields_set == {"sparse_ratio", "max_sparse_ratio"}
    assert entry.settings_for("bias").model_fields_set == {"sparse_ratio", "max_sparse_ratio", "align"}


def test_a_target_setting_of_null_takes_a_shortcut_back() -> None:
    entry = PruneEntry(
        op_types=("Linear",),
        sparse_ratio=0.5,
        target_settings={"bias": PruneTarget(sparse_ratio=None, sparse_threshold=2)},
    )
    assert entry.settings_for("bias").sparse_ratio is None
    assert entry.settings_for("bias").sparse_threshold == 2.0
    assert entry.settings_for("weight").sparse_ratio == 0.5


def test_input_and_output_are_short_for_the_first() -> None:
    entry = QuantizeEntry(
        op_names=("fc",),
        target_names=("_input_", "_output_", "weight"),
        target_settings={"_output_": QuantizeTarget(quant_dtype="uint4")},
    )
    assert entry.target_names == ("_input_0", "_output_0", "weight")
    assert entry.settings_for("_output_").quant_dtype == "uint4"
    assert entry.settings_for("_output_0").quant_dtype == "uint4"
    assert entry.settings_for("_input_0").quant_dtype == "int8"


def test_defaults_are_those_of_the_semantics() -> None:
    quantize, distill = QuantizeEntry(op_names=("a",)), DistillEntry(op_names=("a",))
    prune = PruneEntry(op_names=("a",), sparse_ratio=0.1).settings_for("weight")
    assert (prune.granularity, prune.apply_method, prune.align) == ("default", "mul", None)
    assert (quantize.quant_dtype, quantize.quant_scheme, quantize.apply_method) == ("int8", "symmetric", "clamp_round")
    assert (distill.lambda_, distill.link, distill.apply_method) == (1.0, "auto", "mse")
    assert distill.settings_for("_output_0").model_fields_set == set()


def test_lambda_keeps_its_name_in_files() -> None:
    (entry,) = parse_config_list("distiller", [{"op_names": ["fc"], "lambda": 2, "link": ["a", "b"]}])
    assert entry.lambda_ == 2.0
    assert entry.link == ("a", "b")
    assert entry.model_dump(mode="json") == {"op_names": ["fc"], "lambda": 2.0, "link": ["a", "b"]}
    assert entry.settings_for("_output_0").model_fields_set == {"lambda_", "link"}


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("in_channel", "in_channel"),
        ([4], (4,)),
        ([1, -1], (1, -1)),
        ([[2, 2], "back", 1], ((2, 2), "back", 1)),
    ],
)
def test_granularity_forms(granularity: Any, expected: object) -> None:
    assert PruneEntry(op_names=("a",), sparse_ratio=0.5, granularity=granularity).granularity == expected


@pytest.mark.parametrize(
    "granularity", ["channel", [0], [-2], [], [[2], "middle", 1], [[2], "front"], 4, [1.5], [True]]
)
def test_granularity_refuses_other_forms(granularity: object) -> None:
    (problem,) = problems("pruner", {"op_names": ["a"], "sparse_ratio": 0.5, "granularity": granularity})
    assert problem.where == "config_list[0].granularity"
    assert "'out_channel'" in problem.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sparse_ratio", 1.0),
        ("sparse_ratio", -0.1),
        ("sparse_ratio", "0.5"),
        ("sparse_ratio", True),
        ("sparse_ratio", float("nan")),
        ("sparse_threshold", float("inf")),
        ("internal_metric_block", 0),
        ("apply_method", "multiply"),
        ("op_types", "Conv2d"),
        ("op_types", [3]),
        ("op_names", [""]),
        ("op_names_re", ["conv("]),
        ("target_names", []),
        ("align", "weight"),
        ("global_group_id", 3.5),
    ],
)
def test_a_wrong_value_is_refused_at_its_key_and_quoted(key: str, value: object) -> None:
    found = problems("pruner", {"op_names": ["a"], "align": {"dims": [0]}, key: value})
    assert len(found) == 1
    assert found[0].where.startswith(f"config_list[0].{key}")
    assert found[0].remedy or "regular expression" in found[0].message


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "int16", "uint2"])
def test_integer_types(dtype: str) -> None:
    assert QuantizeEntry(op_names=("a",), quant_dtype=dtype).quant_dtype == dtype


@pytest.mark.parametrize("dtype", ["int1", "int17", "float8", "8", "xint8", "int8 ", "int32"])
def test_other_types_are_refused(dtype: str) -> None:
    (problem,) = problems("quantizer", {"op_names": ["a"], "quant_dtype": dtype})
    assert repr(dtype) in problem.message


def test_fuse_names_are_two_or_three_different_modules() -> None:
    entry = QuantizeEntry(op_types=("Conv2d",), fuse_names=(("c", "b"), ("c2", "b2", "r2")))
    assert entry.fuse_names == (("c", "b"), ("c2", "b2", "r2"))
    for wrong in (["c"], ["c", "c"], ["a", "b", "c", "d"], "cb"):
        (problem,) = problems("quantizer", {"op_types": ["Conv2d"], "fuse_names": [wrong]})
        assert problem.where == "config_list[0].fuse_names[0]"


def test_conflicting_keys_are_reported_beside_wrong_values() -> None:
    found = problems(
        "pruner",
        {
            "sparse_ratio": 0.5,
            "sparse_threshold": 1.0,
            "min_sparse_ratio": 0.6,
            "max_sparse_ratio": 0.4,
            "granularity": 1,
        },
    )
    assert {problem.where for problem in found} == {
        "config_list[0]",
        "config_list[0].sparse_threshold",
        "config_list[0].min_sparse_ratio",
        "config_list[0].granularity",
    }


def test_a_conflict_between_an_entry_and_a_target_is_found() -> None:
    (problem,) = problems(
        "pruner",
        {"op_types": ["Linear"], "sparse_ratio": 0.5, "target_settings": {"bias": {"sparse_threshold": 1.0}}},
    )
    assert problem.where == "config_list[0].target_settings.bias"
    assert "exclude each other" in problem.message


def test_settings_of_a_target_that_is_not_taken_are_refused() -> None:
    entry = {"op_names": ["a"], "target_names": ["_input_"], "target_settings": {"weight": {}, "_input_0": {}}}
    (problem,) = problems("quantizer", entry)
    assert problem.where == "config_list[0].target_settings.weight"


def test_settings_given_twice_under_two_spellings_are_refused() -> None:
    (problem,) = problems("quantizer", {"op_names": ["a"], "target_settings": {"_input_": {}, "_input_0": {}}})
    assert "_input_0" in problem.message


@pytest.mark.parametrize(("apply_method", "accepted"), [("bypass", True), ("mul", False)])
def test_a_pruner_is_told_how_much(apply_method: str, accepted: bool) -> None:
    entry = {"op_types": ["Conv2d"], "apply_method": apply_method}
    if accepted:
        parse_config_list("pruner", [entry])
    else:
        assert "how much" in problems("pruner", entry)[0].message


def test_every_entry_is_checked_and_nearest_names_are_given() -> None:
    found = problems(
        "pruner",
        {"op_type": ["Conv2d"], "op_names": ["a"], "sparse_ratio": 0.5},
        {"op_names": ["a"], "sparsity_ratio": 0.5, "align": {"module": "b"}},
        3,
        QuantizeEntry(op_names=("a",)),
    )
    assert [problem.where for problem in found] == [
        "config_list[0].op_type",
        "config_list[1].align.module",
        "config_list[1].sparsity_ratio",
        "config_list[2]",
        "config_list[3]",
    ]
    assert found[0].remedy == "did you mean 'op_types'?"
    assert found[1].remedy == "did you mean 'module_name'?"
    assert found[2].remedy == "did you mean 'sparse_ratio'?"
    assert "QuantizeEntry" in found[4].message


@pytest.mark.parametrize("config_list", [[], {}, {"op_names": ["a"]}, "Conv2d", None])
def test_a_config_list_is_a_list_of_entries(config_list: object) -> None:
    with pytest.raises(ConfigError, match=r"config: got .*list of at least one"):
        parse_config_list("quantizer", config_list, where="config")


def test_entries_may_be_objects() -> None:
    entry = PruneEntry(op_types=("Conv2d",), sparse_ratio=0.5)
    assert parse_config_list("pruner", (entry,)) == (entry,)
    assert parse_config_list("pruner", [entry])[0] is entry


def test_entries_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        PruneEntry(op_types=("Conv2d",), sparse_ratio=0.5).sparse_ratio = 0.1


@pytest.mark.parametrize(
    ("kind", "entry", "remedies"),
    [
        ("pruner", {"op_types": ["A"], "sparsity": 0.5}, ["write sparse_ratio"]),
        ("pruner", {"op_types": ["A"], "sparsity_per_layer": 0.5}, ["write sparse_ratio"]),
        ("pruner", {"op_types": ["A"], "total_sparsity": 0.5}, ["write sparse_ratio with a global_group_id"]),
        (
            "pruner",
            {"op_types": ["A"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.8},
            ["write sparse_ratio with a global_group_id", "write max_sparse_ratio"],
        ),
        ("pruner", {"op_partial_names": ["a"], "sparse_ratio": 0.5}, ["write op_names_re: ['.*part of a name.*']"]),
        ("pruner", {"op_types": ["A"], "target_settings": {"weight": {"sparsity": 0.5}}}, ["write sparse_ratio"]),
        (
            "quantizer",
            {"op_types": ["A"], "quant_types": ["input"]},
            ["write target_names: ['_input_', 'weight', '_output_']"],
        ),
        ("pruner", {"op_types": ["A"], "sparse_rato": 0.5}, ["did you mean 'sparse_ratio'?"]),
        ("distiller", {"op_type": ["A"], "lambda": 0.5}, ["did you mean 'op_types'?"]),
    ],
)
def test_an_older_or_misspelt_key_is_told_alone(kind: Any, entry: dict[str, Any], remedies: list[str]) -> None:
    found = problems(kind, entry)
    assert [problem.remedy for problem in found] == remedies
    assert all(problem.message.startswith("unknown key") for problem in found)


def test_an_entry_that_only_excludes_is_told_alone() -> None:
    first, second = problems("pruner", {"exclude": True, "op_names": ["a"]}, {"op_names": ["b"], "granularty": [1]})[:2]
    assert first.message == "unknown key 'exclude'" and "exclude_op_names" in first.remedy
    assert second.where == "config_list[1].granularty"


@pytest.mark.parametrize("kind", ["pruner", "quantizer", "distiller"])
def test_an_empty_entry_is_told_once(kind: Any) -> None:
    (only,) = problems(kind, {})
    assert only.message == "it is empty" and only.remedy.startswith("add op_types, op_names or op_names_re")


def test_a_missing_goal_is_told_beside_a_key_that_means_something_else() -> None:
    told = [problem.message for problem in problems("pruner", {"op_names": ["b"], "granularty": [1]})]
    assert told == ["unknown key 'granularty'", "it does not say how much to prune"]
