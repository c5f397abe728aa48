"""One row per algorithm: how to put it on a network. Every test of contracts runs for every row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from raycomp.core.chain import Chain
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.pruning import AGPPruner, L1NormPruner, LinearPruner, TaylorPruner
from raycomp.quantization import QATQuantizer

STEPS = 8
"""Optimizer steps after which every row has made its last decision."""
CLASSES = 3


class Network(nn.Module):
    """Convolutions with batch norms, a residual sum and a head; the input is [n, 1, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.branch_norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        stem = functional.relu(self.stem_norm(self.stem(images)))
        joined = self.act(stem + self.branch_norm(self.branch(stem)))
        return self.head(joined.mean(dim=(2, 3)))


def network(dtype: torch.dtype = torch.float32) -> Network:
    """The same one each time."""
    torch.manual_seed(7)
    return Network().to(dtype)


@dataclass(frozen=True)
class Algorithm:
    """A row.

    Args:
        name: of the algorithm.
        build: puts it on a network that has convolutions and a linear layer; gives the compressor.
        masks, quantizes: what is to be seen of it after training.
    """

    name: str
    build: Callable[[nn.Module], Any]
    masks: bool = False
    quantizes: bool = False


@dataclass
class Run:
    """A network under an algorithm, with its optimizer."""

    algorithm: Algorithm
    dtype: torch.dtype = torch.float32
    model: nn.Module = field(init=False)
    chain: Chain = field(init=False)
    optimizer: Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.model = network(self.dtype)
        self.chain = self.algorithm.build(self.model).chain
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train(
        self, steps: Iterable[int] = range(STEPS), forward: Callable[[Tensor], Tensor] | None = None
    ) -> list[float]:
        """Trains on the batches of these numbers, through `forward` instead of the model if it is given; the losses."""
        self.model.train()
        forward = self.model if forward is None else forward
        losses = []
        with self.chain.run([self.optimizer]):
            for step in steps:
                batch = batch_of(step, self.dtype)
                self.optimizer.zero_grad()
                loss = self.chain.loss(functional.cross_entropy(forward(batch[0]), batch[1]), batch)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                losses.append(float(loss.detach()))
        return losses


def batch_of(step: int, dtype: torch.dtype = torch.float32, size: int = 12) -> tuple[Tensor, Tensor]:
    """The batch of that number: images and classes that depend on them."""
    generator = torch.Generator().manual_seed(step)
    target = torch.randint(0, CLASSES, (size,), generator=generator)
    images = torch.randn(size, 1, 6, 6, generator=generator) + target.view(-1, 1, 1, 1)
    return images.to(dtype), target


def _teacher_predict(batch: Any, teacher: nn.Module) -> Any:
    return teacher(batch[0])


_HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
_INT8 = [
    {"op_types": ["Conv2d"], "target_settings": {"weight": {"granularity": "out_channel"}}},
    {"op_types": ["Linear"], "quant_scheme": "affine", "quant_dtype": "uint8"},
]


def _taylor(model: nn.Module) -> TaylorPruner:
    return TaylorPruner(model, _HALF, training_steps=3)


def _folded(model: nn.Module) -> list[dict[str, Any]]:
    """int8 everywhere, with the network's own batch norms folded."""
    pairs = [name for name in ("stem", "branch") if f"{name}_norm" in dict(model.named_modules())]
    first, *rest = _INT8
    return [{**first, "fuse_names": [(name, f"{name}_norm") for name in pairs]}, *rest]


def _distiller(model: nn.Module, on: Any = None) -> DynamicLayerwiseDistiller:
    # The teacher is of another seed, so that there is something to learn from it.
    teacher = copy.deepcopy(model) if on is None else network(next(model.parameters()).dtype)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.25)
    entries = [{"op_types": ["Linear"], "apply_method": "kl"}, {"op_types": ["Conv2d"], "lambda": 0.5}]
    if on is None:
        return DynamicLayerwiseDistiller(model, entries, None, teacher, _teacher_predict, 0.5)
    return DynamicLayerwiseDistiller.from_compressor(on, entries, teacher, _teacher_predict, 0.5)


def _fused(model: nn.Module) -> DynamicLayerwiseDistiller:
    pruner = AGPPruner(TaylorPruner(model, _HALF, training_steps=2), interval_steps=2, total_times=3)
    return _distiller(model, QATQuantizer.from_compressor(pruner, _folded(model), 1))


ALGORITHMS = (
    Algorithm("L1NormPruner", lambda model: L1NormPruner(model, _HALF), masks=True),
    Algorithm("TaylorPruner", _taylor, masks=True),
    Algorithm("LinearPruner", lambda model: LinearPruner(L1NormPruner(model, _HALF), 2, 3), masks=True),
    Algorithm("AGPPruner", lambda model: AGPPruner(_taylor(model), 3, 2), masks=True),
    Algorithm("QATQuantizer", lambda model: QATQuantizer(model, _INT8, quant_start_step=3), quantizes=True),
    Algorithm("QATQuantizer with folds", lambda model: QATQuantizer(model, _folded(model)), quantizes=True),
    Algorithm("DynamicLayerwiseDistiller", _distiller),
    Algorithm("all fused", _fused, masks=True, quantizes=True),
)
