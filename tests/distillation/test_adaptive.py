"""Distillation through trained translators: widths that differ, the loss by hand, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.core.moments import RunContext
from raycomp.core.target import TargetId
from raycomp.distillation import Adaptive1dLayerwiseDistiller
from raycomp.errors import CompressionError

KEY = (TargetId("first", "_output_0"), TargetId("first", "_output_0"))


class Net(nn.Module):
    """Layers of a width of its own."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.first(value))


def batch_of(number: int) -> Tensor:
    return torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(number))


def adaptive(student: nn.Module, teacher: nn.Module, *entries: dict[str, Any], origin: float = 0.0) -> Any:
    config = list(entries) or [{"op_names": ["first"]}]
    predict: Any = lambda batch, model: model(batch)  # noqa: E731
    return Adaptive1dLayerwiseDistiller(student, config, None, teacher, predict, origin)


def train(distiller: Any, steps: range, learning_rate: float = 0.0) -> list[float]:
    model, found = distiller.model, []
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    with distiller.chain.run(RunContext([optimizer])):
        for number in steps:
            optimizer.zero_grad()
            batch = batch_of(number)
            loss = distiller.chain.training_step(lambda batch=batch: model(batch).square().mean(), batch)
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


def test_the_loss_and_one_step_of_the_translator_by_hand() -> None:
    student, teacher = Net(4), Net(7, 1)
    distiller = adaptive(student, teacher, {"op_names": ["first"], "lambda": 2.0}, origin=0.5)
    (loss,) = train(distiller, range(1))
    # The first values are drawn as nn.Linear draws them, by the chain's generator.
    drawn = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) - 0.5
    weight, bias = drawn[:, :-1].clone().requires_grad_(), drawn[:, -1].clone().requires_grad_()
    ours, theirs = student.first(batch_of(0)).detach(), teacher.first(batch_of(0)).detach()
    distance = functional.mse_loss(functional.linear(ours, weight, bias), theirs)
    assert loss == pytest.approx(float(0.5 * student(batch_of(0)).square().mean().detach() + 2 * distance.detach()))
    by_hand = torch.optim.Adam([weight, bias], lr=1e-2)
    (2 * distance).backward()
    by_hand.step()
    translator = distiller.translators[KEY]
    assert torch.allclose(translator.weight, weight, atol=1e-6)
    assert torch.allclose(translator.bias, bias, atol=1e-6)


def test_it_learns_a_teacher_of_another_width() -> None:
    distances = train(adaptive(Net(4), Net(7, 1)), range(300), 0.05)
    assert distances[-1] < 0.05 * distances[0]


def test_all_links_count_each_through_a_translator_of_its_own() -> None:
    student, teacher = Net(4), Net(7, 1)
    entry = {"op_names": ["first"], "link": ["first", "second"]}
    distiller = adaptive(student, teacher, entry)
    (loss,) = train(distiller, range(1))
    assert [str(link) for _, link in distiller.translators] == ["first._output_0", "second._output_0"]
    generator = torch.Generator().manual_seed(0)
    expected = 0.0
    hidden = teacher.first(batch_of(0))
    for theirs in (hidden, teacher.second(hidden)):
        drawn = torch.rand(7, 5, generator=generator) - 0.5
        ours = functional.linear(student.first(batch_of(0)), drawn[:, :-1], drawn[:, -1])
        expected += float(functional.mse_loss(ours, theirs).detach())
    assert loss == pytest.approx(expected)


def test_the_students_gradient_goes_through_the_translator() -> None:
    student, teacher = Net(4), Net(7, 1)
    distiller = adaptive(student, teacher)
    train(distiller, range(1), 0.1)
    plain = Net(4)
    drawn = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) - 0.5
    ours = functional.linear(plain.first(batch_of(0)), drawn[:, :-1], drawn[:, -1])
    functional.mse_loss(ours, teacher.first(batch_of(0)).detach()).backward()
    expected = plain.first.weight - 0.1 * plain.first.weight.grad
    assert torch.allclose(student.first.weight, expected, atol=1e-6)


def test_it_is_resumed_to_the_same_bits_and_leaves_nothing_in_the_model() -> None:
    undisturbed = adaptive(Net(4), Net(7, 1))
    names = list(Net(4).state_dict())
    train(undisturbed, range(6), 0.05)
    killed = adaptive(Net(4), Net(7, 1))
    train(killed, range(3), 0.05)
    resumed = adaptive(Net(4), Net(7, 1))
    resumed.model.load_state_dict(killed.model.state_dict())
    resumed.chain.load_state_dict(killed.chain.state_dict())
    train(resumed, range(3, 6), 0.05)
    assert torch.equal(resumed.translators[KEY].weight, undisturbed.translators[KEY].weight)
    assert torch.equal(resumed.translators[KEY].bias, undisturbed.translators[KEY].bias)
    assert torch.equal(resumed.model.first.weight, undisturbed.model.first.weight)
    undisturbed.unwrap_model()
    assert list(undisturbed.model.state_dict()) == names


def test_a_student_in_half_precision_is_translated_in_float32() -> None:
    student = Net(4)
    distiller = adaptive(student, Net(7, 1))
    with distiller.chain.run(RunContext([torch.optim.SGD(student.parameters(), 0.0)])):
        batch = batch_of(0)

        def step() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return student(batch).float().square().mean()

        loss = distiller.chain.training_step(step, batch)
        loss.backward()
    assert loss.dtype == distiller.translators[KEY].weight.dtype == torch.float32
    assert distiller.translators[KEY].weight.grad is not None


def test_a_teacher_of_another_length_is_refused() -> None:
    distiller = adaptive(Net(4), Net(7, 1))
    distiller.teacher_predict = lambda batch, model: model(batch[:, :2])
    with pytest.raises(CompressionError, match=r"the student gives \[\(6, 5, 7\)\], .* gives \[\(6, 2, 7\)\]"):
        train(distiller, range(1))
