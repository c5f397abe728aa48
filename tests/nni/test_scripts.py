"""Scripts as NNI's examples are written, on small models: with their imports changed they do what they did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

import raycomp as nni
from raycomp import TorchEvaluator, auto_set_denpendency_group_ids
from raycomp.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from raycomp.pruning import AGPPruner, L1NormPruner, LinearPruner, SlimPruner, TaylorPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer
from raycomp.speedup import ModelSpeedup, cut_calibration
from tests.contracts.scripts import batch_of, network

BATCHES = [batch_of(number, torch.float32) for number in range(4)]
DUMMY = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
DENSE, HALF = 715, 215
"""Parameters with 8 and with 4 channels: 9c + 2c + (9c² + c) + 2c + (3c + 3)."""


def train(model: Any, optimizer: Any, training_step: Any, lr_scheduler: Any, max_steps: Any, max_epochs: Any) -> None:
    assert max_epochs is not None or max_steps is not None
    left = max_steps or max_epochs * len(BATCHES)
    model.train()
    while True:
        for batch in BATCHES:
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()
            left -= 1
            if not left:
                return
        if lr_scheduler is not None:
            lr_scheduler.step()


def training_step(batch: Any, model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def traced_evaluator(model: nn.Module) -> TorchEvaluator:
    optimizer = nni.trace(Adam)(model.parameters(), lr=0.01)
    return TorchEvaluator(train, optimizer, training_step, nni.trace(LambdaLR)(optimizer, lr_lambda=lambda _: 1.0))


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(DUMMY)  # type: ignore[no-any-return]


def aligned_norms() -> list[dict[str, Any]]:
    """Convolutions, and the outputs of the norms behind them, which follow."""
    align = {"target_name": "weight", "dims": [0]}
    norms = [
        {
            "op_names": [name],
            "target_names": ["_output_"],
            "target_settings": {
                "_output_": {
                    "align": {"module_name": name.removesuffix("_norm"), **align},
                    "granularity": "per_channel",
                }
            },
        }
        for name in ("stem_norm", "branch_norm")
    ]
    return auto_set_denpendency_group_ids(network(), [*CONVOLUTIONS, *norms], DUMMY)  # type: ignore[return-value]


def test_pruning_quick_start() -> None:
    model = network()
    config_list = [{"op_types": ["Linear", "Conv2d"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, config_list)
    _, masks = pruner.compress()
    assert {name: float(mask["weight"].mean()) for name, mask in masks.items()} == {"stem": 0.5, "branch": 0.5}
    pruner.unwrap_model()
    expected = outputs(model)
    assert outputs(ModelSpeedup(model, torch.rand(3, 1, 6, 6), masks).speedup_model()).allclose(expected, atol=1e-5)


def test_pruning_speedup() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    mask = torch.ones_like(model[0].weight)  # type: ignore[arg-type]
    mask[0:3] = 0
    masks = {"0": {"weight": mask, "bias": mask[:, 0, 0, 0]}}
    model = ModelSpeedup(model, DUMMY, masks).speedup_model()  # type: ignore[assignment]
    assert (model[0].out_channels, model[2].in_channels) == (5, 5)


def _taylor(model: nn.Module, config_list: Any) -> tuple[Any, Any]:
    pruner = TaylorPruner(model, config_list, traced_evaluator(model), training_steps=3)
    return pruner, pruner.compress()[1]


def _slim(model: nn.Module, config_list: Any) -> tuple[Any, Any]:
    pruner = SlimPruner(model, config_list, traced_evaluator(model), training_steps=3, regular_scale=1e-4)
    return pruner, pruner.compress()[1]


def _scheduled(kind: Any) -> Callable[[nn.Module, Any], tuple[Any, Any]]:
    def run(model: nn.Module, config_list: Any) -> tuple[Any, Any]:
        sub_pruner = TaylorPruner(model, config_list, traced_evaluator(model), training_steps=3)
        pruner = kind(sub_pruner, interval_steps=3, total_times=4)
        return pruner, pruner.compress(max_steps=3 * 4, max_epochs=None)[1]

    return run


@pytest.mark.parametrize("prune", [_taylor, _slim, _scheduled(AGPPruner), _scheduled(LinearPruner)])
def test_taylor_slim_and_scheduled_pruning(prune: Callable[[nn.Module, Any], tuple[Any, Any]]) -> None:
    model = network()
    pruner, masks = prune(model, auto_set_denpendency_group_ids(model, CONVOLUTIONS, DUMMY))
    pruner.unwrap_model()
    assert masks["stem"]["weight"].flatten(1).any(1).equal(masks["branch"]["weight"].flatten(1).any(1))
    assert masks["stem"]["weight"].mean() == 0.5
    expected = outputs(model)
    model = ModelSpeedup(model, DUMMY, masks).speedup_model()  # type: ignore[assignment]
    assert outputs(model).allclose(expected, atol=1e-5)
    train(model, Adam(model.parameters()), training_step, None, None, 1)


def test_fused_pruning_quantization_and_distillation() -> None:
    model, teacher_model = network(), network()
    sub_pruner = TaylorPruner(model, aligned_norms(), traced_evaluator(model), training_steps=3)
    scheduled_pruner = AGPPruner(sub_pruner, interval_steps=3, total_times=4)
    q_config_list = [
        {"op_types": ["Conv2d"], "quant_dtype": "int8", "target_names": ["_input_"], "granularity": "per_channel"},
        {"op_types": ["Conv2d"], "quant_dtype": "int8", "target_names": ["weight"], "granularity": "out_channel"},
        {
            "op_types": ["BatchNorm2d"],
            "quant_dtype": "int8",
            "target_names": ["_output_"],
            "granularity": "per_channel",
        },
    ]
    quantizer = QATQuantizer.from_compressor(scheduled_pruner, q_config_list, quant_start_step=6)  # type: ignore[arg-type]
    d_config_list = [{"op_types": ["Conv2d"], "lambda": 0.1, "apply_method": "mse"}]
    distiller = DynamicLayerwiseDistiller.from_compressor(
        quantizer, d_config_list, teacher_model, lambda batch, teacher: teacher(batch[0]), 0.1
    )
    distiller.compress(max_steps=20, max_epochs=None)
    simulated = outputs(model)
    distiller.unwrap_model()
    distiller.unwrap_teacher_model()
    speedup = ModelSpeedup(model, DUMMY, scheduled_pruner.get_masks())
    small = speedup.speedup_model()
    assert (parameters(model), parameters(small)) == (DENSE, HALF)

    # NNI's own end of it (speedup.node_infos and a bare Quantizer) is written so.
    calibration_config = cut_calibration(quantizer.get_calibration_config(), speedup.plan)
    sim_quantizer = PtqQuantizer(small, q_config_list)
    sim_quantizer.update_calibration_config(calibration_config)
    assert outputs(small).allclose(simulated, atol=2e-2)


def test_quantization_quick_start() -> None:
    model = network()
    targets = {"quant_dtype": "int8", "quant_scheme": "affine", "granularity": "default"}
    config_list = [
        {"op_names": ["branch", "head"], "target_names": ["_input_", "weight", "_output_"], **targets},
        {"op_names": ["stem"], "target_names": ["_input_", "weight"], "fuse_names": [("stem", "stem_norm")], **targets},
        {"op_names": ["act"], "target_names": ["_output_"], **targets},
    ]
    optimizer = nni.trace(SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    quantizer = QATQuantizer(model, config_list, TorchEvaluator(train, optimizer, training_step), len(BATCHES))
    quantizer.track_forward(BATCHES[0][0])
    _, calibration_config = quantizer.compress(None, max_epochs=3)
    weight, scale = model.head.weight, calibration_config["head"]["weight"]["scale"]
    steps = weight / scale
    assert steps.allclose(steps.round(), atol=1e-3) and steps.unique().numel() > 4
    assert calibration_config["act"]["_output_0"]["tracked_min"] == 0


def test_post_training_quantization() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = nni.trace(SGD)(model.parameters(), lr=0.01, momentum=0.5)
    evaluator = TorchEvaluator(train, optimizer, training_step, evaluating_func=lambda model: None)
    config_list = [{"op_names": ["stem"], "target_names": ["_input_", "weight"], "quant_scheme": "affine"}]
    quantizer = PtqQuantizer(model, config_list, evaluator)
    model, calibration_config = quantizer.compress(None, 5)
    seen = torch.cat([batch[0] for batch in BATCHES])
    assert calibration_config["stem"]["_input_0"]["tracked_max"] == seen.max()
    quantizer.unwrap_model()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_pruning_under_distillers_with_nnis_order_of_arguments() -> None:
    student, teacher_model = network(), network()
    config_list = [{"op_names": ["branch"], "link": ["stem", "branch"], "lambda": 0.9, "apply_method": "mse"}]
    config_list.append({"op_names": ["head"], "link": ["head"], "lambda": 0.9, "apply_method": "kl"})

    def teacher_predict(batch: Any, teacher: nn.Module) -> Any:
        return teacher(batch[0])

    distiller = DynamicLayerwiseDistiller(
        student, config_list, traced_evaluator(student), teacher_model, teacher_predict, origin_loss_lambda=0.1
    )
    taylor_pruner = TaylorPruner.from_compressor(distiller, aligned_norms(), 3)
    agp_pruner = AGPPruner(taylor_pruner, 3, 4)
    agp_pruner.compress(None, 4)
    agp_pruner.unwrap_model()
    distiller.unwrap_teacher_model()
    small = ModelSpeedup(student, DUMMY, agp_pruner.get_masks()).speedup_model()
    assert parameters(small) == HALF

    last = Adaptive1dLayerwiseDistiller(small, config_list[1:], traced_evaluator(small), teacher_model, teacher_predict)
    last.track_forward(DUMMY)
    last.compress(None, 1)
    last.unwrap_model()
    assert parameters(small) == HALF
