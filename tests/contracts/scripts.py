"""The rows of the settings table in a plain script: on a network, trained by an evaluator of the test's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from raycomp.config import COMPRESSORS, Need
from raycomp.core.chain import Chain
from raycomp.core.moments import RunContext
from raycomp.core.rounds import conduct
from tests.contracts.settings import INTEGERS, SETTINGS, Settings, masked_types, settings

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
    """What is put on a network: one row of the settings table, or several fused.

    Args:
        name: for the test's name.
        rows: the settings, the innermost first.
    """

    name: str
    rows: tuple[Settings, ...]

    def build(self, model: nn.Module) -> Chain:
        """Fuses the algorithms on a model."""
        chain = Chain(model, batch_of(0, next(model.parameters()).dtype)[0])
        teacher = _teacher(next(model.parameters()).dtype)
        for row in self.rows:
            _build(chain, row, teacher)
        return chain

    @property
    def masked(self) -> set[str]:
        """The classes of modules whose weights are half masked after training."""
        return {kind for row in self.rows if COMPRESSORS[row["type"]].kind == "pruner" for kind in masked_types(row)}

    @property
    def quantizes(self) -> bool:
        """Whether the convolutions and the linear layer have scales after training."""
        return any(COMPRESSORS[row["type"]].kind == "quantizer" for row in self.rows)

    @property
    def rounds(self) -> int:
        """How many rounds it trains; the turns of a search are stages of a job, and here there is one."""
        rows = [row for row in self.rows if Need.SEARCH not in COMPRESSORS[row["type"]].needs]
        return 1 + max((row.get("total_iteration", row.get("iterations", 0)) for row in rows), default=0)


def _build(chain: Chain, row: Settings, teacher: nn.Module) -> Any:
    registration = COMPRESSORS[row["type"]]
    values = {key: value for key, value in row.items() if key not in ("type", "config_list", "pruner")}
    if "pruner" in row:
        return registration.load()(_build(chain, row["pruner"], teacher), **values)
    if Need.TEACHER in registration.needs:
        values |= {"teacher_model": teacher, "teacher_predict": _teacher_predict}
    return registration.load()(chain, row["config_list"], **values)


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
        self.chain = self.algorithm.build(self.model)
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


def _teacher(dtype: torch.dtype) -> Network:
    """Of other weights than the student, so that there is something to learn from it."""
    teacher = network(dtype)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.25)
    return teacher


_FOLDED = [{**INTEGERS[0], "fuse_names": [("stem", "stem_norm"), ("branch", "branch_norm")]}, INTEGERS[1]]
_SLIM_TICKETS = {"type": "LotteryTicketPruner", "pruner": settings("SlimPruner"), "total_iteration": 2}
_LINKED = [{"op_types": ["Linear"]}, {"op_names": ["stem"], "link": ["stem", "branch"], "lambda": 0.5}]

ALGORITHMS = (
    *(Algorithm(name, (settings(name),)) for name in SETTINGS),
    Algorithm("QATQuantizer with folds", ({"type": "QATQuantizer", "config_list": _FOLDED},)),
    Algorithm(
        "all fused",
        (
            settings("AGPPruner"),
            {"type": "QATQuantizer", "config_list": _FOLDED, "quant_start_step": 1},
            settings("DynamicLayerwiseDistiller"),
        ),
    ),
    Algorithm(
        "all fused in rounds",
        (
            _SLIM_TICKETS,
            {"type": "Adaptive1dLayerwiseDistiller", "config_list": _LINKED, "origin_loss_lambda": 0.5},
            {"type": "PtqQuantizer", "config_list": _FOLDED},
        ),
    ),
)
