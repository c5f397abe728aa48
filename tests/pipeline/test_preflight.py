"""What is wrong with a job is known before a cluster is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from raycomp import Task
from raycomp.config import parse_job
from raycomp.errors import ConfigError, TaskError
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.preflight import check_stages, selection_problems
from raycomp.pipeline.stage import StageStart, resolve_start, stage_chain
from tests.contracts import tiny


class Small(Task):
    """203 samples: 7 global batches of 32."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.randn(203, 8), torch.randint(0, 3, (203,)))

    eval_data = train_data


L1 = {"type": "L1NormPruner", "config_list": [{"op_names": ["0"], "sparse_ratio": 0.5}]}
QAT: dict[str, Any] = {"type": "QATQuantizer", "config_list": [{"op_types": ["Linear"], "target_names": ["weight"]}]}
DISTILLER = {"type": "DynamicLayerwiseDistiller", "config_list": [{"op_names": ["2"]}]}


def job(*stages: list[dict[str, Any]], **training: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "task": {"entrypoint": f"{Path(__file__).name}:Small"},
        "stages": [{"name": f"s{index}", "compressors": found} for index, found in enumerate(stages)],
        "training": {"global_batch_size": 32, "epochs": 2, **training},
    }


def problems(raw: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as raised:
        check_stages(parse_job(raw), Small())
    return [(problem.where, problem.message) for problem in raised.value.problems]


def test_a_job_that_fits_passes() -> None:
    check_stages(parse_job(job([L1], [QAT])), Small())


def test_every_compressor_of_every_stage_is_checked() -> None:
    unknown = {"type": "L1NormPruner", "config_list": [{"op_names": ["9"], "sparse_ratio": 0.5}]}
    assert [where for where, _ in problems(job([unknown, DISTILLER], [unknown]))] == [
        "stages[0].compressors[0].config_list[0].op_names",
        "stages[0].compressors[1]",
        "stages[1].compressors[0].config_list[0].op_names",
    ]


def test_nothing_may_train_after_a_quantizer() -> None:
    assert problems(job([QAT], [L1]))[0][0] == "stages[0].compressors[0].type"


@pytest.mark.parametrize("steps, fits", [(14, True), (15, False)])
def test_a_schedule_must_end_within_the_training(steps: int, fits: bool) -> None:
    late = {"type": "AGPPruner", "interval_steps": steps, "total_times": 1, "pruner": L1}
    if fits:
        check_stages(parse_job(job([late])), Small())
    else:
        found = [("stages[0].compressors[0]", "AGPPruner needs 15 optimizer steps, the stage trains 14")]
        assert problems(job([late])) == found


def test_quantization_must_start_within_the_training() -> None:
    assert problems(job([QAT | {"quant_start_step": 14}])) == [
        ("stages[0].compressors[0]", "QATQuantizer needs 15 optimizer steps, the stage trains 14")
    ]


def test_selections_are_checked_in_a_job_that_is_wrong_otherwise() -> None:
    raw = job([{**L1, "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}, {"sparse_ratio": 7}]}], epoch=3)
    (found,) = selection_problems(raw, Path(__file__).parent)
    assert found.where == "stages[0].compressors[0].config_list[0].op_types"
    assert "Conv2d" in found.message


def test_a_task_that_can_not_be_built_hides_no_other_problem() -> None:
    raw = job([L1])
    raw["task"]["entrypoint"] = "nowhere.py:Nothing"
    assert selection_problems(raw, Path(__file__).parent) == []


def test_targets_that_no_forward_reaches_are_named() -> None:
    missing = {"op_names": ["0"], "target_names": ["_input_9", "_output_0", "_output_3"]}
    found = problems(job([{"type": "QATQuantizer", "config_list": [missing]}]))
    assert [message.partition(":")[0] for _, message in found] == ["0._input_9", "0._output_3"]


def test_two_compressors_of_one_target_hide_no_other_problem() -> None:
    unknown = {"type": "QATQuantizer", "config_list": [{"op_names": ["9"], "target_names": ["weight"]}]}
    known = {"type": "QATQuantizer", "config_list": [{"op_names": ["0"], "target_names": ["weight"]}]}
    assert [where for where, _ in problems(job([known, known, unknown]))] == [
        "stages[0].compressors[2].config_list[0].op_names",
        "stages[0].compressors[1].config_list[0]",
    ]


def test_what_will_be_masked_and_can_not_be_cut_is_told() -> None:
    """The last layer's outputs are the model's, 51 of 195 parameters; the first one's go."""
    raw = job([{"type": "L1NormPruner", "config_list": [{"op_types": ["Linear"], "sparse_ratio": 0.5}]}])
    (warning,) = check_stages(parse_job(raw), Small()).warnings
    assert warning.startswith("stage s0: 2 (26% of the parameters) will be masked and can't be cut: ")
    assert check_stages(parse_job({**raw, "speedup": {"enabled": False}}), Small()).warnings == ()


class Wider(Small):
    """Its teacher's first layer is wider than the student's."""

    def teacher(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))


def test_links_of_other_shapes_are_told_unless_a_map_is_learned() -> None:
    both = [{"op_names": ["0", "2"]}]
    raw = job([{"type": "DynamicLayerwiseDistiller", "config_list": both}])
    with pytest.raises(ConfigError, match=r"the student gives \(2, 16\), the teacher's 0._output_0 gives \(2, 20\)"):
        check_stages(parse_job(raw), Wider())
    check_stages(parse_job(job([{"type": "Adaptive1dLayerwiseDistiller", "config_list": both}])), Wider())


class NoOptimizer(Small):
    def optimizer(self, model: nn.Module) -> Any:
        return torch.optim.SGD([model.get_parameter("9.weight")], lr=0.1)


def test_an_optimizer_that_can_not_be_built_is_told() -> None:
    with pytest.raises(TaskError, match=r"NoOptimizer.optimizer\(\) raised AttributeError"):
        check_stages(parse_job(job([L1])), NoOptimizer())


def test_stages_that_mask_a_target_in_different_ways_are_told() -> None:
    bypassed = {"type": "L1NormPruner", "config_list": [{**L1["config_list"][0], "apply_method": "bypass"}]}
    found = problems(job([L1], [bypassed]))
    assert {where for where, _ in found} == {"stages[1]"}
    assert found[0][1] == "0.weight is masked by 'bypass', and by 'mul' in a stage before"


class Broken(Small):
    """Its user's code raises."""

    def example_input(self) -> torch.Tensor:
        raise KeyError("no example")

    def teacher(self) -> nn.Module:
        raise KeyError("no weights")


@pytest.mark.parametrize(("compressor", "method"), [(L1, "example_input"), (DISTILLER, "teacher")])
def test_what_the_users_code_raises_is_named(compressor: dict[str, Any], method: str) -> None:
    task = Broken() if method == "example_input" else type("Broken", (Small,), {"teacher": Broken.teacher})()
    with pytest.raises(TaskError, match=rf"Broken\.{method}\(\) raised KeyError"):
        check_stages(parse_job(job([compressor])), task)


def test_groups_and_followers_can_be_left_to_the_config() -> None:
    def resolved(**speedup: bool) -> tuple[set[str | None], set[str]]:
        config = parse_job({**tiny.job(tiny.pruner("L1NormPruner")), "speedup": speedup})
        (selection,) = check_stages(config, build_task(config.task)).first.selections
        groups = {each.settings.dependency_group_id for each in selection.selected.values()}
        return groups, {key.module for key in selection.selected}

    groups, modules = resolved()
    assert len(groups - {None}) == 1 and "bn1" in modules
    groups, modules = resolved(dependency_groups=False)
    assert groups == {None} and "bn1" in modules
    groups, modules = resolved(align=False)
    assert len(groups - {None}) == 1 and modules == {"conv", "conv1", "conv2"}


def test_what_cannot_stand_together_is_refused_when_it_is_built() -> None:
    """Each alone can be resolved."""
    config = parse_job(job([QAT, QAT]))
    start = StageStart()
    resolved = resolve_start(config, 0, Small(), start)
    with pytest.raises(ConfigError) as raised:
        stage_chain(config, 0, Small(), start, resolved)
    assert {problem.where for problem in raised.value.problems} == {"stages[0].compressors[1].config_list[0]"}


class Images(Task):
    """Two convolutions, the first one folded with its norm and activation."""

    def model(self) -> nn.Module:
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 2, 3)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 3))

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,)))

    eval_data = train_data


def test_what_int8_will_compute_in_float_is_told_with_the_remedy() -> None:
    targets = ["_input_", "weight"]
    lists = [
        {"op_types": ["Conv2d"], "target_names": targets, "fuse_names": [["0", "1", "2"]]},
        {"op_types": ["ConvTranspose2d", "Linear"], "target_names": targets},
    ]
    config = parse_job(job([{"type": "QATQuantizer", "config_list": lists}], steps=2, epochs=None))
    # The first ends in the second one's input; the second in the third's.
    no_kernel = "ONNX Runtime has no integer kernel for ConvTranspose: leave it out of the quantizer"
    found = [told for told in check_stages(config, Images()).warnings if "int8" in told]
    assert found == [f"int8 will compute in float 4: {no_kernel}"]
    lists[0] = {"op_names": ["0"], "target_names": targets}
    config = parse_job(job([{"type": "QATQuantizer", "config_list": lists}], steps=2, epochs=None))
    assert any(
        told == "int8 will compute in float 0: its output has no scale: add `_output_` to its target_names"
        for told in check_stages(config, Images()).warnings
    )


def test_that_there_will_be_no_int8_model_is_told() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    class Asking(Small):
        def model(self) -> nn.Module:
            return Branching()

    found = check_stages(parse_job(job([QAT])), Asking()).warnings
    assert [told.startswith("there will be no int8 model: ") for told in found] == [True]


class Recurrent(Small):
    """An LSTM in front of the head."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

            def forward(self, value: Tensor) -> Tensor:
                return self.head(self.lstm(value[:, None])[0][:, -1])

        return Net()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (
            {"op_names": ["lstm"], "target_names": ["weight_ih_l0"], "sparse_ratio": 0.5},
            "lstm.weight_ih_l0 (42% of the parameters) will be masked and not be cut: raycomp cuts no other",
        ),
        (
            {"op_names": ["head"], "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": [1, 1]},
            "head.weight (4% of the parameters) will be masked and not be cut: its granularity is finer than channels",
        ),
    ],
)
def test_what_is_masked_in_other_pieces_than_channels_is_told(entry: dict[str, Any], told: str) -> None:
    raw = job([{"type": "L1NormPruner", "config_list": [entry]}])
    assert any(told in warning for warning in check_stages(parse_job(raw), Recurrent()).warnings)


class Double(Small):
    def model(self) -> nn.Module:
        return super().model().double()


def test_a_model_that_trains_in_another_precision_than_its_own_is_told() -> None:
    told = "the model is in float64, and trains and is published in float32; training.precision: float64 keeps it"
    assert told in check_stages(parse_job(job([L1])), Double()).warnings
    for kept, task in (("float64", Double()), ("float64", Small()), ("bf16", Small())):
        found = check_stages(parse_job(job([L1], precision=kept)), task).warnings
        assert not any("is published in" in warning for warning in found)


class Grouped(Small):
    """A transposed convolution of two groups between two others."""

    def model(self) -> nn.Module:
        up = nn.ConvTranspose2d(8, 12, 1, groups=2)
        layers = (nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 8, 1), up, nn.ReLU(), nn.Conv2d(12, 3, 1))
        return nn.Sequential(*layers, nn.Flatten())


@pytest.mark.parametrize(("entry", "told"), [({}, False), ({"granularity": [1, 1, 1, 1]}, True)])
def test_channels_of_a_grouped_transposed_weight_are_channels(entry: dict[str, Any], told: bool) -> None:
    """The blocks of its channels are as many as its groups in its first dimension, too."""
    raw = job([{"type": "L1NormPruner", "config_list": [{"op_names": ["2"], "sparse_ratio": 0.5, **entry}]}])
    found = check_stages(parse_job(raw), Grouped()).warnings
    assert any("2.weight" in warning and "finer than channels" in warning for warning in found) == told


def test_that_nothing_will_be_computed_with_integers_is_told() -> None:
    def told(names: list[str]) -> list[str]:
        entry = {"op_names": ["lstm"], "target_names": names, "quant_dtype": "int8"}
        raw = job([{"type": "QATQuantizer", "config_list": [entry]}])
        return [warning for warning in check_stages(parse_job(raw), Recurrent()).warnings if "int8" in warning]

    assert told(["weight_ih_l0"]) == [
        "int8 will compute in float lstm: ONNX Runtime has no integer kernel for LSTM: leave it out of the quantizer",
        "the int8 model will compute nothing with integers",
    ]
    assert told(["_input_"]) == [
        "the int8 model will compute nothing with integers: no weight is quantized; add `weight` to target_names"
    ]


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.randn(8), torch.tensor(0))] * 64)


@pytest.mark.parametrize("data", [_Stream(), lambda context: iter([(torch.randn(2, 8), torch.zeros(2).long())])])
def test_epochs_of_data_without_a_length_are_refused_before_a_cluster_is_asked(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Small, "train_data", lambda self: data)
    assert problems(job([L1], [L1])) == [
        ("training.epochs", "the train data can't tell its length, so a number of epochs has no number of steps")
    ]
    check_stages(parse_job(job([L1], steps=3, epochs=None)), Small())
