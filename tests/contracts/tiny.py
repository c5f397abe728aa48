"""A job small enough to run whole in a second: a residual network on random images, with every kind of compressor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from raycomp import Task


class TinyNet(nn.Module):
    """Convolutions that can be folded, a residual sum, and a head.

    Args:
        dropout: before the head.
        checkpointing: whether the branch is recomputed in the backward pass.
        spare: whether there is a layer that nothing uses.
    """

    def __init__(self, dropout: float = 0.0, checkpointing: bool = False, spare: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(6, 3)
        self.spare = nn.Conv1d(2, 2, 1) if spare else None

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the stem."""
        return self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        branch = checkpoint(self.branch, x, use_reentrant=False) if self.checkpointing else self.branch(x)
        x = self.relu2(branch + x)
        return self.fc(self.dropout(self.flatten(self.pool(x))))


class Tiny(Task):
    """Tells which of three patterns is in a noisy image.

    Args:
        samples: for training; 49 in batches of 16 leave a last batch of 1, which most workers have no part in.
        dropout: before the head.
        learning_rate: the greatest one; with 0 every decision is made from the same weights.
        checkpointing, spare: see `TinyNet`.
    """

    def __init__(
        self,
        samples: int = 49,
        dropout: float = 0.0,
        learning_rate: float = 0.05,
        checkpointing: bool = False,
        spare: bool = False,
    ) -> None:
        self.samples = samples
        self.network = {"dropout": dropout, "checkpointing": checkpointing, "spare": spare}
        self.learning_rate = learning_rate
        self.unused_parameters = spare

    def model(self) -> nn.Module:
        return _network(0, **self.network)

    def teacher(self) -> nn.Module:
        return _network(1)

    def train_data(self) -> TensorDataset:
        return _images(self.samples, 2)

    def eval_data(self) -> TensorDataset:
        return _images(21, 3)

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=1e-4)

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler | None:
        return OneCycleLR(optimizer, self.learning_rate, total_steps=total_steps) if self.learning_rate else None


def _network(seed: int, **network: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyNet(**network)
        for norm in (model.bn, model.bn1, model.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    return model


def _images(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    patterns = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(patterns[labels] + 0.7 * noise, labels)


def pruner(kind: str = "TaylorPruner", **more: Any) -> dict[str, Any]:
    """Half of all output channels."""
    return {"type": kind, "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], **more}


def scheduled_pruner(interval_steps: int = 8, total_times: int = 8) -> dict[str, Any]:
    """Taylor under AGP."""
    taylor = pruner(training_steps=interval_steps)
    return {"type": "AGPPruner", "interval_steps": interval_steps, "total_times": total_times, "pruner": taylor}


def quantizer(quant_start_step: int = 10) -> dict[str, Any]:
    """Weights per channel, activations affine, batch norms folded."""
    activation = {"quant_dtype": "uint8", "quant_scheme": "affine"}
    weight = {"quant_dtype": "int8", "granularity": "out_channel"}
    return {
        "type": "QATQuantizer",
        "quant_start_step": quant_start_step,
        "config_list": [
            {
                "op_types": ["Conv2d"],
                "target_names": ["weight", "_output_"],
                "target_settings": {"weight": weight, "_output_": activation},
                "fuse_names": [["conv", "bn", "relu"], ["conv1", "bn1", "relu1"], ["conv2", "bn2"]],
            },
            {
                "op_types": ["Linear"],
                "target_names": ["_input_", "weight"],
                "target_settings": {"weight": weight, "_input_": activation},
            },
            {"op_names": ["conv"], "target_names": ["_input_"], **activation},
            {"op_names": ["relu2"], "target_names": ["_output_"], **activation},
        ],
    }


def distiller() -> dict[str, Any]:
    """Logits, and activations against the nearer one of two of the teacher's."""
    return {
        "type": "DynamicLayerwiseDistiller",
        "config_list": [
            {"op_names": ["fc"], "apply_method": "kl"},
            {"op_names": ["relu2"], "apply_method": "mse", "link": ["relu", "relu2"]},
        ],
    }


def job(*compressors: dict[str, Any], arguments: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    """A job of one stage; by default all compressors fused, batches of 16, synchronised batch norm."""
    fused = compressors or (scheduled_pruner(), quantizer(), distiller())
    return {
        "name": "tiny",
        "task": {"entrypoint": "tests.contracts.tiny:Tiny", "arguments": arguments or {}},
        "stages": [{"name": "fused", "compressors": list(fused)}],
        "training": {"global_batch_size": 16, "steps": 12, "sync_batch_norm": True, **training},
        "scaling": {"num_workers": 2},
        "evaluation": {"latency_batch_size": 2, "latency_runs": 2},
    }
