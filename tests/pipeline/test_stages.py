"""Masks are the model's state: what one stage masks holds in the next, and what is published is what was simulated."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from raycomp import Task
from raycomp.config import parse_job
from raycomp.core.target import TargetId
from raycomp.errors import ConfigError
from raycomp.pipeline import stage
from raycomp.pipeline.ending.figures import layer_figures, with_metric
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.inputs import differing_inputs
from raycomp.pipeline.preflight import check_stages
from raycomp.pipeline.stage import StageResult, StageStart, real_inputs
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.training.metrics import evaluate
from raycomp.speedup import apply_plan
from tests.contracts import tiny
from tests.contracts.training import Keeper, finish, train

SINGLE = {"type": "L1NormPruner", "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": [1]}]}
CHANNELS = {"type": "L1NormPruner", "config_list": [{"op_names": ["conv1"], "sparse_ratio": 0.5}]}


def job(*stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    raw = {**tiny.job(steps=6, arguments={"learning_rate": 0.01}), **more}
    raw["stages"] = [{"name": f"stage{index}", **each} for index, each in enumerate(stages)]
    return raw


def run(raw: dict[str, Any], folder: Path) -> list[StageResult]:
    """Every stage, trained here and finished as on the head node; starts go through files, as they do in a job."""
    results: list[StageResult] = []
    start = StageStart()
    for index in range(len(raw["stages"])):
        checkpoint = folder / f"checkpoint{index}"
        train(raw, Keeper(checkpoint), index=index, start=start)
        results.append(finish(raw, checkpoint, index, start))
        results[-1].next_start().save(folder / f"start{index}")
        start = StageStart.load(folder / f"start{index}")
    return results


def outputs(model: torch.nn.Module, raw: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(real_inputs(build_task(parse_job(raw).task), torch.float32, 8))
    return found


def test_single_weights_stay_masked_through_a_later_training(tmp_path: Path) -> None:
    raw = job({"compressors": [SINGLE]}, {"compressors": [tiny.distiller()]})
    first, last = run(raw, tmp_path)
    for name in ("conv", "conv1", "conv2"):
        mask = first.masks[name]["weight"]
        assert mask.mean() == 0.5
        weight = last.model.get_submodule(name).weight
        assert torch.equal(weight != 0, mask == 1)
        assert not torch.equal(weight, first.model.get_submodule(name).weight)
    dense = build_task(parse_job(raw).task).model()
    sparsity = {layer.module: layer.sparsity for layer in layer_figures(dense, last.masks, last)}
    assert sparsity["conv1"] == 0.5


def test_single_weights_stay_masked_where_channels_are_cut_in_the_same_stage_and_the_next(tmp_path: Path) -> None:
    raw = job({"compressors": [SINGLE]}, {"compressors": [CHANNELS]}, {"compressors": [tiny.distiller()]})
    first, second, last = run(raw, tmp_path)
    assert last.model.conv1.weight.shape == (3, 6, 3, 3)
    kept = second.plan.surgeries[-1].cuts
    channels = next(cut.keep for cut in kept if cut.tensor == "conv1.weight" and cut.dim == 0)
    assert torch.equal(last.model.conv1.weight != 0, first.masks["conv1"]["weight"][list(channels)] == 1)


def test_a_stage_that_is_not_cut_is_cut_by_the_next(tmp_path: Path) -> None:
    raw = job({"compressors": [CHANNELS], "speedup": False}, {"compressors": [tiny.distiller()]})
    first, last = run(raw, tmp_path)
    assert first.model.conv1.weight.shape[0] == 6
    assert last.model.conv1.weight.shape[0] == 3
    assert last.verification is not None
    assert last.verification.passed


def test_a_stage_that_is_not_cut_hands_on_masks_of_values(tmp_path: Path) -> None:
    """What follows conv2's channels masks relu2's output; both are there, and applied, at the end."""
    raw = job(
        {"compressors": [_masking_values("mul")]}, {"compressors": [tiny.distiller()]}, speedup={"enabled": False}
    )
    first, last = run(raw, tmp_path)
    mask = first.masks["relu2"]["_output_0"]
    assert mask.mean() == 0.5
    assert torch.equal(last.masks["relu2"]["_output_0"], mask)
    torch.testing.assert_close(outputs(last.model, raw), outputs(last.simulated, raw))
    again = apply_plan(build_task(parse_job(raw).task).model(), last.plan).eval()
    again.load_state_dict(last.model.state_dict())
    torch.testing.assert_close(outputs(again, raw), outputs(last.simulated, raw))


def _masking_values(method: str) -> dict[str, Any]:
    align = {"module_name": "conv2", "target_name": "weight"}
    value = {"op_names": ["relu2"], "target_names": ["_output_"], "align": align, "apply_method": method}
    return {"type": "L1NormPruner", "config_list": [{"op_names": ["conv2"], "sparse_ratio": 0.5}, value]}


@pytest.mark.parametrize("method", ["mul", "add", "bypass"])
def test_the_cut_model_computes_what_trained(method: str, tmp_path: Path) -> None:
    raw = job({"compressors": [_masking_values(method)]})
    (result,) = run(raw, tmp_path)
    assert result.masks.method("relu2", "_output_0") == method
    assert result.verification is not None
    assert result.verification.passed
    torch.testing.assert_close(outputs(result.model, raw), outputs(result.simulated, raw))
    unmasked = copy.deepcopy(result.simulated)
    unmasked.relu2.raycomp_targets.targets["_output_0"].masks[0].method = "bypass"
    assert torch.allclose(outputs(unmasked, raw), outputs(result.simulated, raw)) == (method == "bypass")


def test_add_on_a_parameter_is_refused() -> None:
    config = parse_job(job({"compressors": [{"type": "L1NormPruner", "config_list": [
        {"op_names": ["conv1"], "sparse_ratio": 0.5, "apply_method": "add"}]}]}))  # fmt: skip
    with pytest.raises(ConfigError, match="add masks no parameter"):
        check_stages(config, build_task(config.task))


def finished_unverified(folder: Path, **speedup: Any) -> StageResult:
    raw = job({"compressors": [CHANNELS]}, speedup=speedup)
    train(raw, Keeper(folder))
    verify = stage.verify

    def failed(*args: Any) -> Any:
        return replace(verify(*args), passed=False, relative=0.5)

    with patch.object(stage, "verify", failed):
        return finish(raw, folder)


def test_a_model_that_fails_its_verification_is_dropped(tmp_path: Path) -> None:
    raw, result = job({"compressors": [CHANNELS]}), finished_unverified(tmp_path)
    assert result.model.conv1.weight.shape[0] == 6
    assert result.plan.surgeries == ()
    torch.testing.assert_close(outputs(result.model, raw), outputs(result.simulated, raw))
    assert any("nothing was cut" in note and "5.00e-01" in note for note in result.notes)


def test_where_speedup_need_not_be_exact_the_difference_is_told_and_the_model_stays(tmp_path: Path) -> None:
    result = finished_unverified(tmp_path, exact=False)
    assert result.model.conv1.weight.shape[0] == 3
    assert result.verification is not None
    assert result.verification.relative == 0.5
    assert not result.notes


def test_the_scales_of_cut_channels_go_with_them(tmp_path: Path) -> None:
    (result,) = run(job({"compressors": [CHANNELS, tiny.quantizer(2)]}), tmp_path)
    assert result.model.conv1.weight.shape[0] == 3
    assert result.calibration["conv1"]["weight"]["scale"].shape == (3, 1, 1, 1)
    assert result.calibration["conv2"]["weight"]["scale"].shape == (6, 1, 1, 1)


def test_a_start_has_the_precision_of_its_weights() -> None:
    task = tiny.Tiny()
    weights = {
        name: value + 1e-12 if value.is_floating_point() else value
        for name, value in task.model().double().state_dict().items()
    }
    found = StageStart(weights=weights).model(task, 0).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_the_last_stage_resolves_against_the_model_that_the_first_one_cut(tmp_path: Path) -> None:
    raw = job({"compressors": [CHANNELS]}, {"compressors": [CHANNELS]})
    first, last = run(raw, tmp_path)
    assert first.model.conv1.weight.shape[0] == 3
    assert last.masks["conv1"]["weight"].shape[0] == 3
    # A half of three, rounded down.
    assert last.model.conv1.weight.shape[0] == 2


def test_kept_masks_are_no_part_of_a_state_that_lacks_them(tmp_path: Path) -> None:
    raw = job({"compressors": [SINGLE]}, {"compressors": [tiny.distiller()]})
    first, _ = run(raw, tmp_path)
    state = StageState.load(tmp_path / "checkpoint1")
    assert [item["class"] for item in state.training["chain"]["compressors"]] == [
        "KeptMasks",
        "DynamicLayerwiseDistiller",
    ]
    assert {str(key) for key, _ in first.kept.by_target()} >= {str(TargetId("conv", "weight"))}


def test_a_single_stage_that_is_not_cut_masks_its_values_by_itself(tmp_path: Path) -> None:
    raw = job({"compressors": [_masking_values("mul")]}, speedup={"enabled": False})
    (result,) = run(raw, tmp_path)
    assert result.masked is not result.model
    torch.testing.assert_close(outputs(result.model, raw), outputs(result.simulated, raw))
    assert not torch.allclose(outputs(result.masked, raw), outputs(result.simulated, raw))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda value: ((value,), {}), "one"),
        (lambda value: ((value, value), {}), "two"),
        (lambda value: ((), {"x": value}), "named"),
    ],
)
def test_real_inputs_are_what_the_model_is_called_with(given: Any, expected: str) -> None:
    class Called(Task):
        def eval_data(self) -> TensorDataset:
            return TensorDataset(torch.arange(10.0))

        def inputs(self, batch: Any) -> Any:
            return given(batch[0])

    three = torch.tensor([0.0, 1.0, 2.0])
    found = real_inputs(Called(), torch.float32, 3)
    tensors = {"one": lambda: [found], "two": lambda: list(found), "named": lambda: [found["x"]]}[expected]()
    assert len(tensors) == (2 if expected == "two" else 1)
    assert all(torch.equal(tensor, three) for tensor in tensors)


class Flat(torch.nn.Module):
    """States its size, and takes what a task may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, 8, 3), torch.nn.Linear(128, 3)

    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        return self.fc(self.conv(x).relu().reshape(-1, 128)) / temperature


class FlatTask(tiny.Tiny):
    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return Flat()


@pytest.mark.parametrize(
    "sizes, chosen",
    [
        ([(8, 8), (8, 8)], []),
        ([(8, 8), (16, 8), (12, 8)], [(16, 8), (8, 8)]),
        ([(8, 8), (16, 8), (12, 10)], [(16, 8), (8, 8), (12, 10)]),
        ([(16, 8), (8, 8), (8, 9), (9, 8), (8, 10)], [(16, 8), (8, 8), (8, 9)]),
        ([(4, 9), (9, 5)], [(9, 5), (4, 9)]),
    ],
)
def test_inputs_differ_wherever_those_of_the_data_do(
    sizes: list[tuple[int, int]], chosen: list[tuple[int, int]]
) -> None:
    class Sized(Task):
        def eval_data(self) -> Any:
            return [(torch.zeros(1, *size), 0) for size in sizes]

        def train_data(self) -> Any:
            return self.eval_data()[:1]

    found = differing_inputs(Sized(), torch.float32, 1)
    assert [tuple(each.shape[2:]) for each in found] == chosen


def test_what_a_rewritten_forward_no_longer_takes_is_told(tmp_path: Path) -> None:
    raw = job({"compressors": [{"type": "L1NormPruner", "config_list": [{"op_names": ["conv"], "sparse_ratio": 0.5}]}]})
    raw["task"]["entrypoint"] = "tests.pipeline.test_stages:FlatTask"
    (result,) = run(raw, tmp_path)
    assert result.model.fc.in_features == 64
    assert [note for note in result.notes if "rewritten; it no longer takes temperature" in note]


def test_a_stage_before_the_last_says_what_cutting_did_to_its_metric(tmp_path: Path) -> None:
    raw = job({"compressors": [CHANNELS]}, {"compressors": [tiny.distiller()]})
    first, _ = run(raw, tmp_path)
    parsed = parse_job(raw)
    task = build_task(parsed.task)
    found = with_metric(parsed, task, 0, first).verification
    assert found is not None and (found.reference, found.stage) == ("masked", parsed.stages[0].name)
    assert found.metric_difference == 0.0
    labels = [int(label) for _, label in task.eval_data()]
    hits = evaluate(task, first.under_masks, task.eval_data(), batch_size=8)["accuracy"] * len(labels)
    label = next(each for each in range(3) if labels.count(each) != round(hits))
    with torch.no_grad():
        first.model.fc.bias[label] += 1e3
    broken = with_metric(parsed, task, 0, first).verification
    assert broken is not None
    assert broken.metric_difference == pytest.approx((labels.count(label) - hits) / len(labels))
