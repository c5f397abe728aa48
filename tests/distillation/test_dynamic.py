"""Layerwise distillation: the loss by hand, the choice of links, and a teacher that stays as it was."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp.core.batch_share import BatchShare, use_share
from raycomp.core.watching import watch
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.errors import CompressionError, ConfigError
from tests.pipeline.ranks import on_ranks


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.factor


class Stack(nn.Module):
    """Its layers' outputs are products: 2, 6, 24 for factors 2, 3, 4 and an input of 1."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        for index, factor in enumerate(factors):
            self.add_module(f"layer{index}", Scale(factor))

    def forward(self, value: Tensor) -> Tensor:
        for layer in list(self.children()):
            value = layer(value)
        return value


def predict(batch: Any, teacher: nn.Module) -> Any:
    return teacher(batch)


def losses_of(
    student: nn.Module, teacher: nn.Module, *config_list: dict[str, Any], origin: float = 1.0, steps: int = 1
) -> list[float]:
    """The combined loss of each step without learning; the task's own loss is 100."""
    distiller = DynamicLayerwiseDistiller(student, list(config_list), None, teacher, predict, origin)
    return run(distiller, steps)


def run(distiller: DynamicLayerwiseDistiller, steps: int = 1) -> list[float]:
    student = distiller.model.train()
    optimizer = torch.optim.SGD(student.parameters(), 0.0)
    found = []
    batch = torch.ones(1, 1)
    with distiller.chain.run([optimizer]):
        for _ in range(steps):
            student(batch)
            loss = distiller.chain.loss(torch.tensor(100.0), batch)
            found.append(float(loss.detach()))
            optimizer.step()
    return found


def test_the_loss_is_a_weighted_sum() -> None:
    # Outputs 2, 6 against 1, 2: squares 1 and 16.
    entries = [{"op_names": ["layer0"]}, {"op_names": ["layer1"], "lambda": 0.5}]
    assert losses_of(Stack(2, 3), Stack(1, 2), *entries) == [100 + 1 + 0.5 * 16]
    assert losses_of(Stack(2, 3), Stack(1, 2), *entries, origin=0.25) == [25 + 1 + 8]


def test_a_link_names_the_teachers_module() -> None:
    # The teacher's outputs are 1, 2, 8.
    assert losses_of(Stack(2, 3), Stack(1, 2, 4), {"op_names": ["layer1"], "link": "layer2"}) == [100 + 4]


def test_of_several_links_the_nearest_counts() -> None:
    entry = {"op_names": ["layer1"], "link": ["layer0", "layer1", "layer2"]}
    assert losses_of(Stack(2, 3), Stack(1, 2, 4), entry) == [100 + 4]
    assert losses_of(Stack(1, 1.5), Stack(1, 2, 4), entry) == [100.25]


def test_the_nearest_link_is_chosen_anew_at_each_step() -> None:
    student = Stack(1.0)
    entry = {"op_names": ["layer0"], "link": ["layer0", "layer1"], "lambda": 1}
    distiller = DynamicLayerwiseDistiller(student, [entry], None, Stack(1, 4), predict, 0.0)
    assert run(distiller) == [0]
    with torch.no_grad():
        student.layer0.factor.fill_(5.0)
    assert run(distiller) == [1]


def test_the_gradient_is_that_of_the_sum() -> None:
    student = Stack(2.0)
    distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["layer0"]}], None, Stack(5.0), predict, 0.0)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with distiller.chain.run([optimizer]):
        distiller.chain.loss(student.train()(torch.ones(1, 1)).sum(), torch.ones(1, 1)).backward()
        optimizer.step()
    # d/df (f - 5)² at 2 is -6.
    assert float(student.layer0.factor.detach()) == pytest.approx(2.6)


def test_after_a_run_no_output_is_held() -> None:
    student = Stack(2.0)
    distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["layer0"]}], None, Stack(5.0), predict, 0.0)
    with distiller.chain.run([torch.optim.SGD(student.parameters(), 0.1)]), watch("training"):
        student.train()(torch.ones(1, 1))
        assert [len(recorder.values) for recorder in distiller.recorders.values()] == [1]
    assert [len(recorder.values) for recorder in distiller.recorders.values()] == [0]


def nearest_on_a_rank(rank: int, world: int) -> tuple[float, int]:
    """Rank 0 alone is nearer to the first link; over all samples the second is nearer."""
    student, teacher = Stack(1.0), Stack(1.0, 4.0)
    entry = {"op_names": ["layer0"], "link": ["layer0", "layer1"]}
    distiller = DynamicLayerwiseDistiller(student, [entry], None, teacher, lambda batch, model: model(batch[1]), 0.0)
    optimizer = torch.optim.SGD(student.parameters(), 0.0)
    value = torch.full((1, 1), [1.0, 4.0][rank])
    batch = (value, torch.ones(1, 1))
    with distiller.chain.run([optimizer]), use_share(BatchShare([1, 3][rank], 4, sample_weight=[0.5, 1.5][rank])):
        student.train()(value)
        return float(distiller.chain.loss(torch.tensor(0.0), batch).detach()), rank


def test_all_ranks_take_the_link_that_is_nearest_over_all_samples() -> None:
    # Distances from 1: 0 and 9, so 27/4 in the mean; from 4: 9 and 0, so 9/4, half of the sum of the ranks' parts.
    assert [loss for loss, _ in on_ranks(2, nearest_on_a_rank)] == [4.5, 0]


def nearest_of_equal_parts_on_a_rank(rank: int, world: int) -> float:
    """In a user's own script there are no shares. Rank 0 is much nearer to the second link, rank 1 to the first."""
    student, teacher = Stack(1.0), Stack(1.0, 4.0)
    entry = {"op_names": ["layer0"], "link": ["layer0", "layer1"]}
    distiller = DynamicLayerwiseDistiller(student, [entry], None, teacher, lambda batch, model: model(batch[1]), 0.0)
    value = torch.full((1, 1), [4.0, 2.0][rank])
    with distiller.chain.run([torch.optim.SGD(student.parameters(), 0.0)]):
        student.train()(value)
        return float(distiller.chain.loss(torch.tensor(0.0), (value, torch.ones(1, 1))).detach())


def test_ranks_without_shares_count_alike() -> None:
    # Distances from 1: 9 and 1; from 4: 0 and 4.
    assert on_ranks(2, nearest_of_equal_parts_on_a_rank) == [0, 4]


class Student(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.inner = Form(form)

    def forward(self, value: Tensor) -> Tensor:
        output = self.inner(value)
        parts = output.values() if isinstance(output, dict) else output
        return sum(part for part in parts if part is not None)


class Form(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.form = form

    def forward(self, value: Tensor) -> Any:
        return self.form(value, value * self.factor)


Pair = namedtuple("Pair", ["hidden", "logits"])


@pytest.mark.parametrize(
    ("form", "target"),
    [
        (Pair, "_output_logits"),
        (lambda a, b: (a, b, None), "_output_1"),
        (lambda a, b: {"hidden": a, "logits": b}, "_output_logits"),
    ],
)
def test_parts_of_an_output_are_distilled_and_the_teachers_output_is_whole(form: Any, target: str) -> None:
    teacher = Student(form)
    with torch.no_grad():
        teacher.inner.factor.fill_(5.0)
    seen: list[float] = []
    distiller = DynamicLayerwiseDistiller(
        Student(form),
        [{"op_names": ["inner"], "target_names": [target]}],
        None,
        teacher,
        lambda batch, model: seen.append(float(model(batch))),
    )
    assert run(distiller) == [100 + 9]
    assert seen == [6]


def test_a_sequential_can_be_distilled() -> None:
    def build(factor: float) -> nn.Sequential:
        return nn.Sequential(nn.Sequential(Scale(factor), nn.Identity()), Scale(1.0))

    student = build(2.0)
    distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["0"]}], None, build(5.0), predict)
    assert run(distiller) == [109]
    assert len(student[0]) == 2


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.9)
        self.fc = nn.Linear(3, 2)

    def forward(self, value: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(value)))


def test_the_teacher_stays_as_it_was() -> None:
    teacher = Normed().train()
    teacher.norm.eval()
    teacher.fc.bias.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    modes: list[list[bool]] = []

    def watched(batch: Any, model: nn.Module) -> Any:
        modes.append([module.training for module in model.modules()])
        output = model(batch)
        assert not output.requires_grad
        return output

    student = Normed()
    distiller = DynamicLayerwiseDistiller(student, [{"op_types": ["Linear"]}], None, teacher, watched)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with distiller.chain.run([optimizer]):
        for _ in range(3):
            batch = torch.randn(8, 3) + 5
            loss = distiller.chain.loss(student.train()(batch).square().mean(), batch)
            loss.backward()
            optimizer.step()
    assert modes == [[False] * 4] * 3
    assert [module.training for module in teacher.modules()] == [True, False, True, True]
    assert [p.requires_grad for p in teacher.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.fc._forward_hooks


def test_a_copy_after_a_forward_pass_is_possible_in_mid_training() -> None:
    student = Stack(2.0)
    distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["layer0"]}], None, Stack(5.0), predict)
    with distiller.chain.run([torch.optim.SGD(student.parameters(), 0.1)]):
        student.train()(torch.ones(1, 1))
        copied = copy.deepcopy(student)
        assert float(distiller.chain.loss(torch.tensor(100.0), torch.ones(1, 1)).detach()) == 109
    assert float(copied.eval()(torch.ones(1, 1)).detach()) == 2


def test_what_does_not_run_or_fit_is_told() -> None:
    student = Stack(2.0)
    distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["layer0"]}], None, Stack(5.0), predict)
    with (
        pytest.raises(CompressionError, match=r"layer0._output_0: this module didn't run"),
        distiller.chain.run([torch.optim.SGD(student.parameters(), 0.1)]),
    ):
        distiller.chain.loss(torch.tensor(1.0), torch.ones(1, 1))
    wide = DynamicLayerwiseDistiller(
        Stack(2.0), [{"op_names": ["layer0"]}], None, Stack(5.0), lambda batch, model: model(torch.ones(3, 1))
    )
    with pytest.raises(CompressionError, match=r"the student gives \[\(1, 1\)\], the teacher's .* gives \[\(3, 1\)\]"):
        run(wide)


def test_links_and_targets_are_checked() -> None:
    entries = [
        {"op_names": ["layer0"], "link": ["layer0", "layer7"]},
        {"op_names": ["layer1"], "target_names": ["_input_"]},
    ]
    with pytest.raises(ConfigError) as raised:
        DynamicLayerwiseDistiller(Stack(1, 2), entries, None, Stack(1, 2), predict)
    first, second = [str(problem) for problem in raised.value.problems]
    assert first.startswith(
        "config_list[0].link: the teacher has no module 'layer7' for layer0._output_0 (did you mean"
    )
    assert second == "config_list[1]: layer1._input_0 is no output (distil `_output_` targets)"
    with pytest.raises(CompressionError, match="needs teacher_model and teacher_predict"):
        DynamicLayerwiseDistiller(Stack(1), [{"op_names": ["layer0"]}])
