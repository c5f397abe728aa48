"""A task so small that a job over it is start-up alone, and jobs over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASK = """\
import os
import signal

import torch
from torch import nn
from torch.utils.data import TensorDataset

from raycomp import Task


class Tiny(Task):
    def __init__(self, fault=None):
        self.fault = fault

    def model(self):
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))

    def train_data(self):
        return _data(64)

    def eval_data(self):
        return _data(32)

    def training_step(self, model, batch):
        if self.fault == "raise":
            raise ValueError("the labels are gone")
        return super().training_step(model, batch)


def _data(samples):
    images = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())
"""
RATIO = "stages.0.compressors.0.config_list.0.sparse_ratio"


def tiny_job(folder: Path) -> dict[str, Any]:
    """A job of two steps over the task, which is written into `folder`; its storage is there, too."""
    (folder / "tiny.py").write_text(TASK)
    return {
        "name": "tiny",
        "task": {"entrypoint": "tiny.py:Tiny"},
        "stages": [
            {
                "name": "prune",
                "compressors": [
                    {"type": "L1NormPruner", "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]}
                ],
            }
        ],
        "training": {"global_batch_size": 32, "steps": 2},
        "evaluation": {"latency_runs": 2, "latency_batch_size": 2},
        "storage": {"uri": str(folder / "stored")},
    }
