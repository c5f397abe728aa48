"""The settings table: one row per algorithm, from which it inherits every test of contracts, as script and as job.

The rows fit any network of convolutions with batch norms and a linear layer.
"""

from __future__ import annotations

from typing import Any

from raycomp.config import COMPRESSORS

Settings = dict[str, Any]

HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
HALF_OF_CHANNELS = [{**HALF[0], "granularity": "out_channel"}]
HALF_OF_THE_NORMS = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
INTEGERS = [
    {
        "op_types": ["Conv2d"],
        "target_names": ["_input_", "weight"],
        "target_settings": {"weight": {"granularity": "out_channel"}},
    },
    {
        "op_types": ["Linear"],
        "target_names": ["_input_", "weight"],
        "quant_scheme": "affine",
        "quant_dtype": "uint8",
        "target_settings": {"weight": {"quant_dtype": "int8", "quant_scheme": "symmetric"}},
    },
]
OUTPUTS = [{"op_types": ["Linear"], "apply_method": "kl"}, {"op_types": ["Conv2d"], "lambda": 0.5}]

SETTINGS: dict[str, Settings] = {
    "L1NormPruner": {"config_list": HALF},
    "LevelPruner": {"config_list": HALF_OF_CHANNELS},
    "L2NormPruner": {"config_list": HALF},
    "FPGMPruner": {"config_list": HALF},
    "LAMPPruner": {"config_list": HALF_OF_CHANNELS},
    "RandomPruner": {"config_list": HALF},
    "ActivationAPoZRankPruner": {"config_list": HALF, "training_steps": 4},
    "ActivationMeanRankPruner": {"config_list": HALF, "training_steps": 4, "activation": "gelu"},
    "TaylorPruner": {"config_list": HALF, "training_steps": 3},
    "GroupNormPruner": {"config_list": HALF},
    "GroupTaylorPruner": {"config_list": HALF, "training_steps": 3},
    "SlimPruner": {"config_list": HALF_OF_THE_NORMS, "training_steps": 5, "regular_scale": 0.1},
    "MovementPruner": {"config_list": HALF, "warmup_step": 1, "cooldown_begin_step": 6},
    "ADMMPruner": {
        "config_list": HALF_OF_CHANNELS,
        "iterations": 2,
        "training_epochs": 1,
        "rho": 0.1,
    },
    "LinearPruner": {"pruner": {"type": "L1NormPruner", "config_list": HALF}, "interval_steps": 2, "total_times": 3},
    "AGPPruner": {
        "pruner": {"type": "TaylorPruner", "config_list": HALF, "training_steps": 3},
        "interval_steps": 3,
        "total_times": 2,
    },
    "SimulatedAnnealingPruner": {
        "pruner": {"type": "L1NormPruner", "config_list": HALF},
        "cool_down_rate": 0.4,
        "candidates": 2,
    },
    "AutoCompressPruner": {
        "pruner": {"type": "L1NormPruner", "config_list": HALF},
        "cool_down_rate": 0.4,
        "candidates": 2,
        "total_iteration": 1,
    },
    "AMCPruner": {"pruner": {"type": "L1NormPruner", "config_list": HALF}, "total_episode": 3, "candidates": 2},
    "LotteryTicketPruner": {"pruner": {"type": "L1NormPruner", "config_list": HALF}, "total_iteration": 2},
    "QATQuantizer": {"config_list": INTEGERS, "quant_start_step": 3},
    "PtqQuantizer": {"config_list": INTEGERS, "calibration_steps": 3},
    "DynamicLayerwiseDistiller": {"config_list": OUTPUTS, "origin_loss_lambda": 0.5},
    "Adaptive1dLayerwiseDistiller": {"config_list": [{"op_types": ["Linear"], "lambda": 0.1}]},
}
"""Every algorithm has decided all that it decides after 6 steps of a round."""


def settings(name: str) -> Settings:
    """An algorithm's settings as a job has them."""
    return {"type": name, **SETTINGS[name]}


def fused(name: str) -> tuple[str, ...]:
    """An algorithm with one of each other kind."""
    others = {"pruner": "TaylorPruner", "quantizer": "QATQuantizer", "distiller": "DynamicLayerwiseDistiller"}
    return tuple((others | {COMPRESSORS[name].kind: name}).values())


def masked_types(row: Settings) -> set[str]:
    """The classes of modules whose weights a pruner's settings mask."""
    entries = row.get("pruner", row)["config_list"]
    return {kind for entry in entries for kind in entry["op_types"] if "sparse_ratio" in entry}
