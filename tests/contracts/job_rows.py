"""One row per algorithm: its settings in a job. Every test of test_jobs runs for every row."""

from __future__ import annotations

from typing import Any

from tests.contracts import tiny

HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
NORMS = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
ACTIVATIONS = {"quant_dtype": "uint8", "quant_scheme": "affine"}
INTEGERS = [
    {"op_names": ["conv", "conv1", "conv2"], "target_names": ["weight"], "granularity": "out_channel"},
    {"op_names": ["conv1", "conv2", "fc"], "target_names": ["_input_"], **ACTIVATIONS},
    {"op_names": ["fc"], "target_names": ["weight"]},
]
LINKS = [{"op_names": ["fc"], "apply_method": "kl"}, {"op_names": ["relu2"], "link": ["relu", "relu2"]}]

ROWS: dict[str, dict[str, Any]] = {
    "L1NormPruner": {"config_list": HALF},
    "TaylorPruner": {"config_list": HALF, "training_steps": 6},
    "SlimPruner": {"config_list": NORMS, "training_steps": 6, "regular_scale": 0.1},
    "LinearPruner": {"pruner": {"type": "L1NormPruner", "config_list": HALF}, "interval_steps": 2, "total_times": 3},
    "AGPPruner": {
        "pruner": {"type": "TaylorPruner", "config_list": HALF, "training_steps": 3},
        "interval_steps": 3,
        "total_times": 2,
    },
    "LotteryTicketPruner": {"pruner": {"type": "L1NormPruner", "config_list": HALF}, "total_iteration": 2},
    "QATQuantizer": {"config_list": INTEGERS, "quant_start_step": 3},
    "PtqQuantizer": {"config_list": INTEGERS, "calibration_steps": 3},
    "DynamicLayerwiseDistiller": {"config_list": LINKS, "origin_loss_lambda": 0.5},
    "Adaptive1dLayerwiseDistiller": {"config_list": [{"op_names": ["fc"], "lambda": 0.1}]},
}


def settings(name: str) -> dict[str, Any]:
    """An algorithm's settings in a stage."""
    return {"type": name, **ROWS[name]}


def job(*names: str, **training: Any) -> dict[str, Any]:
    """A job with a stage of these algorithms; 10 steps over epochs of 4, the last of which holds a single sample."""
    return tiny.job(*map(settings, names), **{"steps": 10, "precision": "float64", **training})


def fused(name: str) -> tuple[str, ...]:
    """An algorithm with one of each other kind."""
    pruner = name if name.endswith("Pruner") else "TaylorPruner"
    quantizer = name if name.endswith("Quantizer") else "QATQuantizer"
    distiller = name if name.endswith("Distiller") else "DynamicLayerwiseDistiller"
    return pruner, quantizer, distiller
