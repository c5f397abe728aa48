"""What a training draws: its order of samples and its dropout, by seed, epoch and worker."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raycomp.core.reduction import rank
from tests.contracts import tiny
from tests.contracts.training import Keeper, train
from tests.pipeline.ranks import on_ranks

Epochs = dict[int, list["Draw"]]
_drawn: Epochs = defaultdict(list)


class Draw(NamedTuple):
    """A training step's samples, and numbers that dropout would take next."""

    samples: list[float]
    noise: list[float]


class Drawing(tiny.Tiny):
    """Keeps what each training step got."""

    def training_step(self, model: nn.Module, batch: Any) -> Tensor:
        noise = torch.rand(4)
        _drawn[len(_drawn) - 1].append(Draw(batch[0][:, 0, 0, 0].tolist(), noise.tolist()))
        return super().training_step(model, batch)


class Counter(Keeper):
    """Opens a new epoch's list after each checkpoint, of which there is one an epoch."""

    def checkpoint(self, *args: Any) -> None:
        _drawn[len(_drawn)] = []
        super().checkpoint(*args)


def drawn(seed: int = 0, resume: Path | None = None, folder: Path | None = None, end_after: int | None = None) -> Any:
    """The draws of each of three epochs of four steps, or of those after the checkpoint."""
    _drawn.clear()
    _drawn[0] = []
    raw = tiny.job(tiny.distiller(), steps=12, seed=seed)
    raw["task"]["entrypoint"] = f"{__name__}:Drawing"
    train(raw, Counter(folder, end_after), resume)
    return [epoch for epoch in _drawn.values() if epoch]


def test_epochs_draw_anew_and_a_resumed_one_draws_the_same(tmp_path: Path) -> None:
    first, second, third = drawn()
    assert [len(epoch) for epoch in (first, second, third)] == [4, 4, 4]
    values = [sorted(value for draw in epoch for value in draw.samples) for epoch in (first, second, third)]
    assert values[0] == values[1] == values[2]
    for one, other in ((first, second), (second, third), (first, third)):
        assert [draw.samples for draw in one] != [draw.samples for draw in other]
        assert one[0].noise != other[0].noise
    assert drawn(folder=tmp_path, end_after=1) == [first]
    torch.rand(7)
    assert drawn(resume=tmp_path) == [second, third]


def test_another_seed_draws_another_order_and_dropout() -> None:
    one, other = drawn(seed=1)[0], drawn(seed=2)[0]
    assert one[0].samples != other[0].samples
    assert one[0].noise != other[0].noise


def drawn_on_a_rank(own: int, world: int) -> Any:
    assert rank() == own
    return drawn()


def test_workers_drop_out_differently() -> None:
    first, second = on_ranks(2, drawn_on_a_rank)
    assert first[0][0].noise != second[0][0].noise
