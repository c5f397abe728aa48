"""One row per algorithm: how to put it on a network. Every test of contracts runs for every row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from raycomp.core.chain import Chain
from raycomp.core.moments import RunContext
from raycomp.core.rounds import conduct
from raycomp.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from raycomp.pruning import AGPPruner, L1NormPruner, LinearPruner, LotteryTicketPruner, SlimPruner, TaylorPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer

STEPS = 8
"""Optimizer steps of a round, after which every row has made its decisions of the round."""
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
        masks: the modules whose weights are half masked after training.
        quantizes: whether the convolutions and the linear layer have scales after training.
        rounds: how many rounds it trains.
    """

    name: str
    build: Callable[[nn.Module], Any]
    masks: tuple[str, ...] = ()
    quantizes: bool = False
    rounds: int = 1


class Killed(Exception):
    """Ends a training as the death of a worker does: nothing is told."""


class Batches:
    """An evaluator: each round trains on the same `STEPS` batches, and goes on where the chain stands.

    Args:
        model: the network.
        optimizer: over its parameters.
        dtype: of the images.
    """

    example = None

    def __init__(self, model: nn.Module, optimizer: Optimizer, dtype: torch.dtype) -> None:
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self.forward: Callable[[Tensor], Tensor] = model
        self.dies_before: int | None = None
        self.losses: list[float] = []
        self._fresh = copy.deepcopy(optimizer.state_dict())

    def train(self, trainee: Chain, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """One round, or the rest of it."""
        self.model.train()
        with trainee.run(RunContext([self.optimizer], total_steps=STEPS)):
            for number in range(trainee.steps_in_round, STEPS):
                if trainee.step == self.dies_before:
                    raise Killed
                batch = batch_of(number, self.dtype)
                self.optimizer.zero_grad()
                loss = trainee.training_step(lambda batch=batch: self._loss(batch), batch)
                loss.backward()
                self.optimizer.step()
                self.losses.append(float(loss.detach()))
            trainee.end_round()

    def calibrate(self, trainee: Chain, max_steps: int | None = None) -> None:
        """Forward alone, on the first `max_steps` batches or all."""
        with trainee.calibrating():
            for number in range(max_steps or STEPS):
                trainee.calibration_step(lambda number=number: self._loss(batch_of(number, self.dtype)))

    def evaluate(self, model: nn.Module) -> float:
        """The part of a batch beyond the training's that is classified right."""
        images, target = batch_of(STEPS, self.dtype)
        return float((model(images).argmax(1) == target).float().mean())

    def reset(self) -> None:
        """The optimizer as it was at first."""
        self.optimizer.load_state_dict(copy.deepcopy(self._fresh))

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(self.forward(batch[0]), batch[1])


@dataclass
class Run:
    """A network under an algorithm, with its optimizer."""

    algorithm: Algorithm
    dtype: torch.dtype = torch.float32
    model: nn.Module = field(init=False)
    chain: Chain = field(init=False)
    optimizer: Optimizer = field(init=False)
    evaluator: Batches = field(init=False)

    def __post_init__(self) -> None:
        self.model = network(self.dtype)
        self.chain = self.algorithm.build(self.model).chain
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.evaluator = Batches(self.model, self.optimizer, self.dtype)
        self.chain.evaluator = self.evaluator

    def train(self, dies_before: int | None = None, forward: Callable[[Tensor], Tensor] | None = None) -> list[float]:
        """All that is left of the rounds and the calibration; the losses of the steps.

        Args:
            dies_before: the step, counted from 0 over all rounds, that is not made: `Killed` is raised.
            forward: what runs instead of the model.
        """
        self.evaluator.dies_before = dies_before
        self.evaluator.forward = self.model if forward is None else forward
        conduct(self.chain, max(self.chain.rounds, 1))
        return self.evaluator.losses


def batch_of(step: int, dtype: torch.dtype = torch.float32, size: int = 12) -> tuple[Tensor, Tensor]:
    """The batch of that number: images and classes that depend on them."""
    generator = torch.Generator().manual_seed(step)
    target = torch.randint(0, CLASSES, (size,), generator=generator)
    images = torch.randn(size, 1, 6, 6, generator=generator) + target.view(-1, 1, 1, 1)
    return images.to(dtype), target


def _teacher_predict(batch: Any, teacher: nn.Module) -> Any:
    return teacher(batch[0])


_HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
_HALF_OF_THE_NORMS = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
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


def _teacher(dtype: torch.dtype) -> Network:
    """Of other weights than the student, so that there is something to learn from it."""
    teacher = network(dtype)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.25)
    return teacher


def _distiller(model: nn.Module, on: Any = None) -> DynamicLayerwiseDistiller:
    teacher = _teacher(next(model.parameters()).dtype)
    entries = [{"op_types": ["Linear"], "apply_method": "kl"}, {"op_types": ["Conv2d"], "lambda": 0.5}]
    if on is None:
        return DynamicLayerwiseDistiller(model, entries, None, teacher, _teacher_predict, 0.5)
    return DynamicLayerwiseDistiller.from_compressor(on, entries, teacher, _teacher_predict, 0.5)


def _fused(model: nn.Module) -> DynamicLayerwiseDistiller:
    pruner = AGPPruner(TaylorPruner(model, _HALF, training_steps=2), interval_steps=2, total_times=3)
    return _distiller(model, QATQuantizer.from_compressor(pruner, _folded(model), 1))


def _adaptive(model: nn.Module, on: Any = None) -> Adaptive1dLayerwiseDistiller:
    teacher = _teacher(next(model.parameters()).dtype)
    entries = [{"op_types": ["Linear"]}, {"op_names": ["stem"], "link": ["stem", "branch"], "lambda": 0.5}]
    if on is None:
        return Adaptive1dLayerwiseDistiller(model, entries, None, teacher, _teacher_predict, 0.5)
    return Adaptive1dLayerwiseDistiller.from_compressor(on, entries, teacher, _teacher_predict, 0.5)


def _slim(model: nn.Module) -> SlimPruner:
    return SlimPruner(model, _HALF_OF_THE_NORMS, training_steps=5, regular_scale=0.1)


def _fused_in_rounds(model: nn.Module) -> PtqQuantizer:
    pruner = LotteryTicketPruner(_slim(model), 2)
    return PtqQuantizer.from_compressor(_adaptive(model, pruner), _folded(model))


_CONVOLUTIONS = ("stem", "branch")
_NORMS = ("stem_norm", "branch_norm")

ALGORITHMS = (
    Algorithm("L1NormPruner", lambda model: L1NormPruner(model, _HALF), masks=_CONVOLUTIONS),
    Algorithm("TaylorPruner", _taylor, masks=_CONVOLUTIONS),
    Algorithm("SlimPruner", _slim, masks=_NORMS),
    Algorithm("LinearPruner", lambda model: LinearPruner(L1NormPruner(model, _HALF), 2, 3), masks=_CONVOLUTIONS),
    Algorithm("AGPPruner", lambda model: AGPPruner(_taylor(model), 3, 2), masks=_CONVOLUTIONS),
    Algorithm(
        "LotteryTicketPruner",
        lambda model: LotteryTicketPruner(L1NormPruner(model, _HALF), 2),
        masks=_CONVOLUTIONS,
        rounds=3,
    ),
    Algorithm("QATQuantizer", lambda model: QATQuantizer(model, _INT8, quant_start_step=3), quantizes=True),
    Algorithm("QATQuantizer with folds", lambda model: QATQuantizer(model, _folded(model)), quantizes=True),
    Algorithm("PtqQuantizer", lambda model: PtqQuantizer(model, _INT8, calibration_steps=3), quantizes=True),
    Algorithm("DynamicLayerwiseDistiller", _distiller),
    Algorithm("Adaptive1dLayerwiseDistiller", _adaptive),
    Algorithm("all fused", _fused, masks=_CONVOLUTIONS, quantizes=True),
    Algorithm("all fused in rounds", _fused_in_rounds, masks=_NORMS, quantizes=True, rounds=3),
)
