"""What NNI's scripts call: taken, or one error that says what to write instead."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import raycomp
from raycomp import TorchEvaluator
from raycomp.config import COMPRESSORS, nni, parse_job
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.errors import CompressionError, ConfigError
from raycomp.pruning import AGPPruner, L1NormPruner, LotteryTicketPruner, SlimPruner, TaylorPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer
from raycomp.speedup import ModelSpeedup, UnprunedWarning

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ENTRY: dict[str, object] = {"op_names": ["0"], "sparse_ratio": 0.5}
PACKAGES = (
    "raycomp",
    *(f"raycomp.{name}" for name in ("pruning", "quantization", "distillation", "evaluators", "speedup")),
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)]
    model = nn.Sequential(*layers).eval()
    nn.init.uniform_(model[1].bias, 0.5, 1)  # type: ignore[arg-type]
    return model


def masked(config_list: list[dict[str, object]]) -> tuple[nn.Sequential, dict[str, dict[str, torch.Tensor]]]:
    model = network()
    pruner = L1NormPruner(model, config_list)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    return model, masks


def evaluator(model: nn.Module) -> TorchEvaluator:
    return TorchEvaluator(lambda *_: None, torch.optim.SGD(model.parameters()), lambda batch, model: model(batch).sum())


def test_nnis_spelling_integer_groups_and_traced_optimizers_are_taken() -> None:
    assert raycomp.auto_set_denpendency_group_ids is raycomp.auto_set_dependency_group_ids
    assert raycomp.trace(torch.optim.SGD) is torch.optim.SGD
    for key in ("dependency_group_id", "global_group_id"):
        masks = L1NormPruner(network(), [{**ENTRY, key: 1}]).compress()[1]
        assert int(masks["0"]["weight"].flatten(1).any(1).sum()) == 4


# Names.


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_lacks_says_what_to_write(package: str) -> None:
    for name in nni.NAMES.keys() - set(import_module(package).__all__):
        with pytest.raises(ImportError, match=rf"^{package} has no {name} \((write|there are|a|any|parameters|L1Norm)"):
            exec(f"from {package} import {name}")
    assert not hasattr(import_module(package), "unheard_of")


def test_an_algorithm_that_is_not_there_or_elsewhere_names_those_that_are() -> None:
    pruners = ", ".join(name for name, each in COMPRESSORS.items() if each.kind == "pruner")
    with pytest.raises(ImportError, match=rf"raycomp has no NetAdaptPruner \(there are {pruners}\)"):
        from raycomp import NetAdaptPruner  # noqa: F401
    with pytest.raises(ImportError, match=r"\(write from raycomp\.pruning import L1NormPruner\)"):
        from raycomp import L1NormPruner  # type: ignore[attr-defined]  # noqa: F401


NNI_3 = {
    "raycomp": "TorchEvaluator LightningEvaluator TransformersEvaluator DeepspeedTorchEvaluator Pruner Quantizer "
    "Distiller auto_set_denpendency_group_ids PruningSetting QuantizationSetting DistillatoinSetting trace SCHEDULER",
    "raycomp.pruning": "LevelPruner L1NormPruner L2NormPruner FPGMPruner MovementPruner LinearPruner AGPPruner "
    "SlimPruner TaylorPruner",
    "raycomp.quantization": "QATQuantizer BNNQuantizer DoReFaQuantizer LsqQuantizer PtqQuantizer LsqPlusQuantizer",
    "raycomp.distillation": "DynamicLayerwiseDistiller Adaptive1dLayerwiseDistiller TeacherModelBasedDistiller",
    "raycomp.speedup": "ModelSpeedup auto_set_denpendency_group_ids MaskUpdater Replacer TransformersAttentionReplacer "
    "ModelSpeedupTensorRT Calibrator",
}
"""What NNI 3.0's packages offer, under the packages of the README's table."""


def test_each_public_name_of_nnis_is_there_or_answered() -> None:
    for package, names in NNI_3.items():
        known = import_module(package).__all__
        assert not [name for name in names.split() if name not in known and name not in nni.NAMES]


def test_what_is_there_is_not_told_to_be_missing() -> None:
    assert not nni.NAMES.keys() & COMPRESSORS.keys()


def test_remedies_name_what_there_is() -> None:
    texts = [*nni.NAMES.values(), *nni.ARGUMENTS.values(), *nni.ATTRIBUTES.values()]
    imported = [found for text in texts for found in re.findall(r"from (raycomp[\w.]*) import (\w+)", text)]
    dotted = [found for text in texts for found in re.findall(r"\b(raycomp(?:\.\w+)?)\.(\w+)\(", text)]
    assert len(imported) > 5 and len(dotted) > 3
    for package, name in imported + dotted:
        assert getattr(import_module(package), name), name


def test_a_job_files_type_of_nnis_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"there is no 'QAT_Quantizer' \(write QATQuantizer; there are LevelPruner, "):
        parse_job({"stages": [{"name": "a", "compressors": [{"type": "QAT_Quantizer"}]}]})


# Arguments.


def test_every_argument_that_is_lacking_is_told_at_once_and_the_model_is_not_touched() -> None:
    for name in nni.ARGUMENTS.keys() - {"model", "config_list"}:
        model = network()
        before = str(model)
        with pytest.raises(ConfigError) as caught:
            L1NormPruner(model, [ENTRY], **{name: 1, "unheard_of": 2})
        first, second = caught.value.problems
        assert (first.message, first.remedy) == (f"it has no argument '{name}'", nni.ARGUMENTS[name])
        assert second.message == "it has no argument 'unheard_of'" and str(model) == before


def test_a_schedule_of_nni_2s_says_that_a_pruner_comes_first() -> None:
    with pytest.raises(ConfigError) as caught:
        AGPPruner(network(), [ENTRY], pruning_algorithm="l1", total_iteration=10)  # type: ignore[arg-type, call-arg]
    algorithm, iteration, pruner = caught.value.problems
    assert algorithm.remedy.startswith("write the pruner first") and "interval_steps" in iteration.remedy
    assert pruner.message == "it goes around a pruner, not a Sequential"


def own_teacher(model: nn.Module) -> Any:
    pruner = L1NormPruner(model, [ENTRY])
    return DynamicLayerwiseDistiller.from_compressor(pruner, [{"op_names": ["3"]}], model, lambda batch, teacher: 0)


def test_a_second_evaluator_is_told_not_to_be_used() -> None:
    model = network()
    pruner = L1NormPruner(model, [ENTRY], evaluator(model))
    with pytest.warns(UserWarning, match="the one given here is not used"):
        QATQuantizer.from_compressor(pruner, [{"op_names": ["3"]}], evaluator=evaluator(model))
    with pytest.warns(UserWarning, match="the one given here is not used"):
        AGPPruner(pruner, 1, 1, evaluator(model))


SGD = torch.optim.SGD(nn.Linear(1, 1).parameters())
QUANTIZE: list[dict[str, object]] = [{"op_names": ["0"]}]


@pytest.mark.parametrize(
    ("construct", "text"),
    [
        (lambda: PtqQuantizer(network(), QUANTIZE, None, True), "PtqQuantizer.calibration_steps: got true"),
        (lambda: QATQuantizer(network(), QUANTIZE, None, -3), "QATQuantizer.quant_start_step: got -3"),
        (lambda: QATQuantizer(network(), QUANTIZE, SGD), "QATQuantizer.evaluator: got a SGD .write TorchEvaluator"),
        (lambda: TaylorPruner(network(), [ENTRY], None, 1.5), "TaylorPruner.training_steps: got 1.5"),
        (lambda: SlimPruner(network(), [ENTRY], None, 3, "x"), "SlimPruner.regular_scale: got 'x'"),
        (lambda: L1NormPruner(network(), [ENTRY], "normal"), "L1NormPruner.evaluator: got 'normal'"),
        (lambda: L1NormPruner([ENTRY], network()), r"L1NormPruner.model: got \[{"),
        (lambda: AGPPruner(L1NormPruner(network(), [ENTRY]), 2, "3"), "AGPPruner.total_times: got '3'"),
        (lambda: LotteryTicketPruner(L1NormPruner(network(), [ENTRY]), 2, "no"), "reset_weight: got 'no'"),
        (lambda: TorchEvaluator(None, SGD, print), "TorchEvaluator.training_func: got null"),
        (lambda: TorchEvaluator(print, network(), print), "TorchEvaluator.optimizers: got a Sequential"),
        (lambda: DynamicLayerwiseDistiller(network(), [ENTRY], None, 3), "teacher_model: got 3"),
        (lambda: own_teacher(network()), "teacher_model: it is the student itself .*deepcopy"),
        (lambda: ModelSpeedup(network(), X, "masks.pth"), r"ModelSpeedup.masks: got 'masks.pth' .*torch\.load"),
        (lambda: ModelSpeedup(network(), X, {}, "cpu"), "4 arguments are given by position, it takes model, dummy_i"),
        (lambda: ModelSpeedup(network(), X, {}, exakt=False), r"no argument 'exakt' .*'exact'"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_told_by_its_name(construct: Callable[[], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        construct()
    assert len(caught.value.problems) == 1


def test_a_criterion_in_place_of_a_training_step_is_told() -> None:
    model = network()

    def train(model: Any, optimizer: Any, criterion: Any, *_: Any) -> None:
        criterion(model(X), X[:, :1].expand(2, 4, 8, 8)).backward()
        optimizer.step()

    trains = TorchEvaluator(train, torch.optim.SGD(model.parameters(), lr=0.1), functional.mse_loss)
    with pytest.raises(CompressionError, match=r"the model's output, .*\(write training_step\(batch, model\)"):
        TaylorPruner(model, [ENTRY], trains, training_steps=1).compress()
    with pytest.raises(CompressionError, match="the model's output"):
        PtqQuantizer(network(), QUANTIZE, trains).compress(max_steps=1)


def test_numbers_of_numpy_are_numbers() -> None:
    pruner = SlimPruner(network(), [ENTRY], None, np.int64(3), np.float32(0.5))  # type: ignore[arg-type]
    assert (pruner.training_steps, pruner.regular_scale) == (3, 0.5)
    with pytest.raises(ConfigError, match=r"training_steps: got 3\.5"):
        SlimPruner(network(), [ENTRY], None, np.float64(3.5))  # type: ignore[arg-type]


# Attributes.


def test_what_an_object_lacks_says_what_to_write() -> None:
    model = network()
    pruner = L1NormPruner(model, [ENTRY], evaluator(model))
    schedule = AGPPruner(pruner, 1, 1)
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_names": ["3"]}])
    teach = DynamicLayerwiseDistiller.from_compressor(quantizer, [{"op_names": ["3"]}], network(), lambda b, t: t(b))
    for each in (pruner, schedule, quantizer, teach, pruner.evaluator, ModelSpeedup(network(), X, {})):
        for name, remedy in nni.ATTRIBUTES.items():
            with pytest.raises(AttributeError, match=re.escape(f"{type(each).__name__} has no {name} ({remedy})")):
                getattr(each, name)
        with pytest.raises(AttributeError, match=r"has no attribute 'unheard_of'$"):
            _ = each.unheard_of  # type: ignore[union-attr]


def test_an_error_within_an_attribute_is_not_hidden() -> None:
    class Mine(L1NormPruner):
        @property
        def window(self) -> int:
            return None.nothing  # type: ignore[attr-defined, no-any-return]

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'nothing'"):
        Mine(network(), [ENTRY])


def test_signatures_are_shown_as_they_are_written() -> None:
    assert [*inspect.signature(TaylorPruner).parameters][-1] == "training_steps"
    assert [*inspect.signature(AGPPruner).parameters][:2] == ["pruner", "interval_steps"]
    assert "exact" in inspect.signature(ModelSpeedup).parameters


def test_copies_are_made_as_ever() -> None:
    pruner = L1NormPruner(network(), [ENTRY])
    assert copy.deepcopy(pruner).compress()[1]["0"]["weight"].equal(pruner.compress()[1]["0"]["weight"])


def test_masks_and_scales_that_were_stored_go_where_nnis_bases_took_them(tmp_path: Path) -> None:
    model, masks = masked([{**ENTRY, "target_names": ["weight"], "apply_method": "bypass"}])
    torch.save(masks, tmp_path / "masks.pth")
    loaded = torch.load(tmp_path / "masks.pth", weights_only=True)
    assert loaded.methods == masks.methods and loaded["0"]["weight"].equal(masks["0"]["weight"])  # type: ignore[attr-defined]
    calibration = {"0": {"weight": {"scale": 0.5, "zero_point": 3, "tracked_min": -1.0, "tracked_max": 2.0}}}
    quantizer = PtqQuantizer(model, [{"op_names": ["0"], "target_names": ["weight"]}])
    quantizer.update_calibration_config(calibration)
    assert float(quantizer.get_calibration_config()["0"]["weight"]["scale"]) == 0.5


def test_outputs_of_a_class_of_ones_own_follow_an_embedding_without_a_pruning_setting() -> None:
    class OwnAttention(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), OwnAttention(8, 8))
    raycomp.register_template("pruner", "OwnAttention", ["_output_"])
    align = {"module_name": "0", "target_name": "weight", "dims": [1]}
    config_list: list[dict[str, Any]] = [
        {"op_types": ["Embedding"], "sparse_ratio": 0.5, "granularity": [-1, 1]},
        {"op_types": ["OwnAttention"], "target_settings": {"_output_": {"align": align}}},
    ]
    masks = L1NormPruner(model, config_list).compress()[1]
    kept = model[0].weight.abs().sum(0).argsort()[4:].sort().values  # type: ignore[operator, union-attr]
    assert masks["1"]["_output_0"].nonzero().flatten().equal(kept)


def test_a_schedule_shows_the_model_as_it_was_written() -> None:
    model = network()
    pruner = AGPPruner(L1NormPruner(model, [ENTRY], evaluator(model)), 1, 1)
    with pruner.as_written():
        assert dict(model.named_parameters()).keys() == dict(network().named_parameters()).keys()


# Speedup.


def test_a_result_that_is_dropped_is_warned_of() -> None:
    model, masks = masked(raycomp.align_followers(network(), [ENTRY], X))
    with pytest.warns(UserWarning, match="not changed in place: write model = ModelSpeedup"):
        ModelSpeedup(model, X, masks).speedup_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = ModelSpeedup(model, X, masks).speedup_model()
        assert ModelSpeedup(model, X, masks).speedup_model()(X).shape == small(X).shape


def test_what_blocks_a_channel_behind_a_norm_names_what_frees_it() -> None:
    model, masks = masked([ENTRY])
    speedup = ModelSpeedup(model, X, masks)
    with pytest.warns(UnprunedWarning, match=r"channels of 0 stay in the model: .*align_followers"):
        assert speedup.speedup_model()[0].out_channels == 8  # type: ignore[index]
    assert all("align_followers" in item.reason for item in speedup.unpruned) and speedup.unpruned
    model, masks = masked(raycomp.align_followers(network(), [ENTRY], X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelSpeedup(model, X, masks).speedup_model()[0].out_channels == 4  # type: ignore[index]
