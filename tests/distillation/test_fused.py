"""Several distillers on one student: one teacher runs once, and only the task's own loss is weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp.core.moments import RunContext
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.errors import CompressionError
from tests.distillation.test_dynamic import Stack, predict

ONE = torch.ones(1, 1)


class Counting(Stack):
    def __init__(self, *factors: float) -> None:
        super().__init__(*factors)
        self.calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        for name, layer in self.named_children():
            value = layer(value) if name.startswith("layer") else value
        return value


def distilled(
    student: nn.Module, *distillers: tuple[str, float, nn.Module, Callable[[Any, nn.Module], Any], float]
) -> DynamicLayerwiseDistiller:
    """(module, lambda, teacher, predict, origin) each."""
    last: Any = None
    for module, weight, teacher, run, origin in distillers:
        entry = {"op_names": [module], "lambda": weight}
        if last is None:
            last = DynamicLayerwiseDistiller(student, [entry], None, teacher, run, origin)
        else:
            last = DynamicLayerwiseDistiller.from_compressor(last, [entry], teacher, run, origin)
    return last


def losses(distiller: DynamicLayerwiseDistiller, steps: int = 1) -> list[float]:
    """The task's own loss is 100."""
    optimizer = torch.optim.SGD(distiller.model.parameters(), 0.0)
    found = []
    with distiller.chain.run(RunContext([optimizer])):
        for _ in range(steps):
            loss = distiller.chain.training_step(lambda: distiller.model(ONE).sum() * 0 + 100, ONE)
            found.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
    return found


def test_a_shared_teacher_runs_once_for_each_batch() -> None:
    # The student gives 2 and 6, the teacher 1 and 2.
    teacher = Counting(1, 2)
    distiller = distilled(Stack(2, 3), ("layer0", 1.0, teacher, predict, 1.0), ("layer1", 0.5, teacher, predict, 1.0))
    assert losses(distiller, 3) == [100 + 1 + 0.5 * 16] * 3
    assert teacher.calls == 3
    assert losses(distiller, 2) == [109] * 2
    assert teacher.calls == 5
    assert not teacher.layer0._forward_hooks and not teacher.layer1._forward_hooks


def test_accumulated_micro_batches_are_batches_of_their_own() -> None:
    teacher = Counting(1, 2)
    distiller = distilled(Stack(2, 3), ("layer0", 1.0, teacher, predict, 1.0), ("layer1", 1.0, teacher, predict, 1.0))
    optimizer = torch.optim.SGD(distiller.model.parameters(), 0.0)
    with distiller.chain.run(RunContext([optimizer])):
        for batch in (ONE, 2 * ONE):
            loss = distiller.chain.training_step(lambda batch=batch: distiller.model(batch).sum() * 0, batch)
            assert float(loss.detach()) == (1 + 16) * float(batch) ** 2
            loss.backward()
        optimizer.step()
    assert teacher.calls == 2


def test_ways_to_run_the_teacher_are_kept_apart() -> None:
    teacher = Counting(1, 2)
    tripled = lambda batch, model: model(3 * batch)  # noqa: E731
    distiller = distilled(Stack(2, 3), ("layer0", 1.0, teacher, predict, 1.0), ("layer1", 1.0, teacher, tripled, 1.0))
    # 2 against 1, and 6 against 3 · 2.
    assert losses(distiller) == [100 + 1 + 0]
    assert teacher.calls == 2


def test_two_teachers_run_each() -> None:
    first, second = Counting(1, 2), Counting(1, 4)
    distiller = distilled(Stack(2, 3), ("layer0", 1.0, first, predict, 1.0), ("layer1", 1.0, second, predict, 1.0))
    assert losses(distiller) == [100 + 1 + 4]
    assert (first.calls, second.calls) == (1, 1)


@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_origins_weigh_the_task_and_no_distance(first: float, second: float) -> None:
    teacher = Stack(1, 2)
    distiller = distilled(
        Stack(2, 3), ("layer0", 3.0, teacher, predict, first), ("layer1", 5.0, teacher, predict, second)
    )
    assert losses(distiller) == [100 * first * second + 3 * 1 + 5 * 16]


def test_a_run_that_cannot_begin_leaves_the_teacher_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Counting(1, 2).train()
    distiller = distilled(Stack(2, 3), ("layer0", 1.0, teacher, predict, 1.0), ("layer1", 0.5, teacher, predict, 1.0))

    def fails(context: RunContext) -> None:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(distiller, "begin_run", fails)
        losses(distiller)
    assert teacher.training and not teacher.layer0._forward_hooks
    assert losses(distiller) == [109]
    assert teacher.training and not teacher.layer0._forward_hooks


class Twice(nn.Module):
    """Its layer runs as often as it is told."""

    def __init__(self, factor: float, times: int) -> None:
        super().__init__()
        self.layer = Stack(factor)
        self.times = times

    def forward(self, value: Tensor) -> Tensor:
        return torch.stack([self.layer(value * (index + 1)) for index in range(self.times)]).sum()


def test_a_module_that_runs_twice_is_held_against_both_and_must_run_as_often() -> None:
    entry = [{"op_names": ["layer"]}]
    both = DynamicLayerwiseDistiller(Twice(2, 2), entry, None, Twice(1, 2), predict)
    # 2 against 1 and 4 against 2.
    assert losses(both) == [100 + 1 + 4]
    uneven = DynamicLayerwiseDistiller(Twice(2, 2), entry, None, Twice(1, 1), predict)
    with pytest.raises(CompressionError, match=r"ran 2 times in the training step, the .* 1 times"):
        losses(uneven)
