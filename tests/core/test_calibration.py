"""A calibration of any origin is judged in one place: it is right, or one error names target, key, value and remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp.core.calibration import canonical_calibration
from raycomp.core.target import TargetId
from raycomp.deploy.int8.int8 import foreseen_hindrances, lower_int8
from raycomp.errors import ArtifactError, CompressionError, RaycompError
from raycomp.pipeline.ending.calibration_file import read_calibration
from raycomp.pruning import L1NormPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer
from raycomp.speedup import cut_calibration
from raycomp.speedup.surgery.plan import Plan

WIDTH = 4
INPUT = {"scale": 0.1, "zero_point": 3, "tracked_min": -0.3, "tracked_max": 2}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.Linear(4, 2))


def quantizer() -> QATQuantizer:
    settings = {
        "weight": {"quant_dtype": "int8", "granularity": "out_channel"},
        "_input_": {"quant_dtype": "uint8", "quant_scheme": "affine"},
        "_output_": {"quant_dtype": "uint8", "granularity": "per_channel"},
    }
    return QATQuantizer(network(), [{"op_names": ["0"], "target_names": [*settings], "target_settings": settings}])


def each_channel(shape: tuple[int, ...] = (WIDTH, 1, 1, 1)) -> dict[str, Tensor]:
    zero = torch.zeros(shape)
    return {"scale": zero + 0.5, "zero_point": zero, "tracked_min": zero - 1, "tracked_max": zero + 1}


def test_a_right_one_is_taken_whatever_its_numbers_are_written_as() -> None:
    found = quantizer()
    weight = {key: value.tolist() for key, value in each_channel().items()}
    found.update_calibration_config({"0": {"_input_": INPUT, "weight": weight | {"quant_dtype": "int8", "axis": 0}}})
    taken = found.get_calibration_config()["0"]
    assert set(taken) == {"_input_0", "weight"}
    assert (float(taken["_input_0"]["scale"]), int(taken["_input_0"]["zero_point"])) == (pytest.approx(0.1), 3)
    assert taken["weight"]["scale"].equal(torch.full((WIDTH, 1, 1, 1), 0.5))


@pytest.mark.parametrize(
    ("calibration", "told"),
    [
        (None, r"^calibration: got null \(\{module: \{target: "),
        ("calibration.json", r"^calibration: got 'calibration.json' \(\{module"),
        ([1], r"^calibration: got \[1\] \(\{module"),
        ({"nope": {}}, r"^calibration\['nope'\]: QATQuantizer quantizes no such module \(choose from 0\)"),
        ({"1": {}}, r"^calibration\['1'\]: QATQuantizer quantizes no such module"),
        ({0: {}}, r"^calibration\[0\]: got 0 as a module"),
        ({"0": None}, r"^calibration\['0'\]: got null \(\{module"),
        ({"0": [INPUT]}, r"^calibration\['0'\]: got \[\{"),
        ({"0": {1: INPUT}}, r"^calibration\['0'\]: got \{1: "),
        ({"0": {"weight": None}}, r"^0\.weight: got null \(\{scale"),
        ({"0": {"weight_bits": 8}}, r"^0\.weight_bits: got 8 \(\{scale"),
        ({"0": {"wight": INPUT}}, r"^0\.wight: QATQuantizer has no such target \(did you mean '0\.weight'\?\)"),
        ({"0": {"_input_": INPUT, "_input_0": INPUT}}, r"^0\._input_0: the calibration names it twice"),
        (
            {"0": {"_input_": {"scale": 1.0}}},
            r"^0\._input_0: the calibration lacks zero_point, tracked_min,",
        ),
    ],
)
def test_another_form_is_refused(calibration: Any, told: str) -> None:
    with pytest.raises(CompressionError, match=told):
        quantizer().update_calibration_config(calibration)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("scale", float("nan"), r"scale is nan \(should be a finite number above 0"),
        ("scale", float("inf"), r"scale is inf \("),
        ("scale", 0, r"scale is 0\.0 \("),
        ("scale", -0.5, r"scale is -0\.5 \("),
        ("scale", 1e-60, r"scale is 0\.0 \("),
        ("scale", None, r"scale is null \(should be a number"),
        ("scale", "0.1", r"scale is '0\.1' \(should be a number"),
        ("scale", True, r"scale is true \(should be a number"),
        ("scale", [], r"scale is \[\] \("),
        ("scale", [[1.0], [1.0, 2.0]], r"scale is \[\[1\.0\], \[1\.0, 2\.0\]\] \("),
        ("scale", 1 + 2j, r"scale is \(1\+2j\) \("),
        ("scale", torch.ones(1).to_sparse(), r"scale is a Tensor|scale is tensor"),
        ("scale", torch.ones(1, device="meta"), r"scale is "),
        ("scale", torch.ones(2), r"scale has the shape \(2,\) \(should be \(\)\)"),
        ("zero_point", 256, r"zero_point is 256 \(should be a whole number from 0 to 255\)"),
        ("zero_point", -1, r"zero_point is -1 \("),
        ("zero_point", 2.5, r"zero_point is 2\.5 \("),
        ("zero_point", float("nan"), r"zero_point is nan \("),
        ("tracked_min", 3.0, r"tracked_min is 3\.0 \(should be at most tracked_max, 2\.0\)"),
        ("tracked_min", float("-inf"), r"tracked_min is -inf \(should be a finite number\)"),
        ("tracked_max", float("nan"), r"tracked_max is nan \("),
        ("quant_dtype", "int8", r"quant_dtype is 'int8' \(should be 'uint8', as the config list says\)"),
        ("quant_dtype", None, r"quant_dtype is null \("),
        ("quant_scheme", "symmetric", r"quant_scheme is 'symmetric' \(should be 'affine'"),
        ("quant_bits", torch.tensor([8, 8]), r"quant_bits is tensor\(\[8, 8\]\) \(should be 8"),
        ("quant_max", 127, r"quant_max is 127 \(should be 255"),
        ("axis", 5, r"axis is 5 \(should be the one dimension"),
        ("axis", "x", r"axis is 'x' \("),
        ("sclae", 1.0, r"has no key 'sclae' \(did you mean 'scale'\?\)"),
        (3, 1.0, r"has no key 3 \(choose from scale, "),
    ],
)
def test_a_value_that_no_range_has_is_refused_and_nothing_is_taken(key: Any, value: Any, told: str) -> None:
    found = quantizer()
    with pytest.raises(CompressionError, match=rf"^0\._input_0: the calibration('s)? {told}"):
        found.update_calibration_config({"0": {"weight": each_channel(), "_input_": {**INPUT, key: value}}})
    assert found.get_calibration_config() == {}


@pytest.mark.parametrize(
    ("target", "shape", "told"),
    [
        ("weight", (WIDTH + 1, 1, 1, 1), rf"shape \(5, 1, 1, 1\) \(should be \({WIDTH}, 1, 1, 1\)\)"),
        ("weight", (1, WIDTH, 1, 1), r"should be \(4, 1, 1, 1\)"),
        ("weight", (WIDTH,), r"should be \(4, 1, 1, 1\)"),
        ("_output_", (1, WIDTH), r"a scale for each entry of dimension 1, and the size 1 in the others"),
        ("_output_", (WIDTH, 1, 1, 1), r"a scale for each entry of dimension 1"),
    ],
)
def test_scales_of_another_shape_are_told_the_right_one(target: str, shape: tuple[int, ...], told: str) -> None:
    if target == "_output_":  # symmetric uint8 has its zero in the middle
        entry = each_channel(shape) | {"zero_point": torch.full(shape, 128.0)}
    else:
        entry = each_channel(shape)
    with pytest.raises(CompressionError, match=told):
        quantizer().update_calibration_config({"0": {target: entry}})


def test_numbers_of_two_shapes_are_refused() -> None:
    entry = each_channel() | {"tracked_max": torch.ones(WIDTH)}
    with pytest.raises(CompressionError, match=r"scale has the shape \(4, 1, 1, 1\), tracked_max \(4,\)"):
        quantizer().update_calibration_config({"0": {"weight": entry}})


WRONG: list[dict[str, Any]] = [{"scale": 0.0}, {"zero_point": 0.5}, {"sclae": 1.0}, {"quant_dtype": "float8"}]
GRID = INPUT | {"quant_dtype": "uint8", "quant_min": 0, "quant_max": 255}


@pytest.mark.parametrize("wrong", WRONG, ids=[*map(str, WRONG)])
def test_every_way_in_judges_alike(wrong: dict[str, Any]) -> None:
    calibration = {"0": {"_input_0": GRID | wrong}}
    model, texts = nn.Sequential(nn.Linear(4, 2)), set()
    ways_in = (
        lambda: PtqQuantizer(
            model, [{"op_names": ["0"], "target_names": ["_input_"], "quant_dtype": "uint8"}]
        ).update_calibration_config({"0": {"_input_": INPUT | wrong}}),
        lambda: cut_calibration(calibration, Plan()),
        lambda: lower_int8(model, calibration, [], torch.ones(2, 4)),
        lambda: read_calibration(json.dumps({"folds": [], "targets": calibration}).encode()),
    )
    for way_in in ways_in:
        with pytest.raises(RaycompError, match=r"0\._input_0: the calibration") as caught:
            way_in()
        texts.add(caught.value.message.removeprefix("0._input_0: "))
    assert len(texts) == 1


def test_a_stored_one_that_is_wrong_is_the_artifacts_fault() -> None:
    stored = {"folds": [], "targets": {"0": {"_input_0": GRID | {"tracked_min": 7.0}}}}
    with pytest.raises(ArtifactError, match=r"^calibration\.json: 0\._input_0: the calibration's tracked_min is 7\.0"):
        read_calibration(json.dumps(stored).encode())


def test_a_module_that_masks_or_a_lowering_don_t_know_is_told_though_it_names_no_target() -> None:
    pruner = L1NormPruner(network(), [{"op_names": ["0"], "sparse_ratio": 0.5}])
    with pytest.raises(CompressionError, match=r"masks\['nope'\]: L1NormPruner prunes no such module"):
        pruner.update_masks({"nope": {}})
    with pytest.raises(CompressionError, match=r"masks\[0\]: got 0 as a module"):
        pruner.update_masks({0: {}})  # type: ignore[dict-item]
    with pytest.raises(RaycompError, match=r"the calibration names 'nope'"):
        lower_int8(nn.Linear(4, 2), {"": {"_input_0": GRID}, "nope": {}}, [], torch.ones(2, 4))


def test_the_form_of_a_calibration_before_there_are_ranges_is_right() -> None:
    """By it validation foresees the int8 model."""
    model = nn.Sequential(nn.Linear(4, 2))
    entry = {"op_names": ["0"], "target_names": ["_input_", "weight", "_output_"], "quant_dtype": "int8"}
    blank = QATQuantizer(model, [entry]).blank_calibration()
    assert set(canonical_calibration(blank)["0"]) == {"_input_0", "weight", "_output_0"}
    assert foreseen_hindrances(nn.Sequential(nn.Linear(4, 2)), blank, [], torch.ones(2, 4)) == {}


def test_an_average_goes_on_from_an_input_by_its_short_name() -> None:
    found = quantizer()
    found.update_calibration_config({"0": {"_input_": INPUT}})
    assert found.state_dict()["averaged"] == [str(TargetId("0", "_input_0"))]
