"""What compressors learn: out of the user's sight, saved, copied and moved with the model, alike on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from raycomp.core.learned import LearnedTensors, Learns
from raycomp.core.moments import RunContext
from raycomp.distillation import Adaptive1dLayerwiseDistiller
from raycomp.pruning import SlimPruner
from tests.pipeline.ranks import on_ranks

TWO_PASSES = Version(torch.__version__) >= Version("2.13")
HALF = [{"op_types": ["BatchNorm1d"], "sparse_ratio": 0.5}]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def batch_of(number: int, size: int = 8) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def slim(model: nn.Module, steps: int = 100) -> tuple[SlimPruner, Tensor]:
    pruner = SlimPruner(model, HALF, training_steps=steps, regular_scale=0.1)
    (factor,) = pruner.factors.values()
    return pruner, factor.factor


def train(pruner: Any, optimizer: Any, steps: range, scheduler: LRScheduler | None = None) -> None:
    model = pruner.model.train()
    with pruner.chain.run(RunContext([optimizer])):
        for number in steps:
            optimizer.zero_grad()
            pruner.chain.training_step(lambda: model(batch_of(number)).square().mean(), None).backward()  # noqa: B023
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def test_it_is_no_parameter_and_is_saved_with_the_model() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]
    pruner, factor = slim(model)
    with pruner.chain.space.as_written():
        assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter is not factor for parameter in model.parameters())
    train(pruner, torch.optim.SGD(model.parameters(), 0.1), range(3))
    (name,) = [name for name in model.state_dict() if name.endswith("factor")]
    saved = model.state_dict()[name]
    assert torch.equal(saved, factor) and not saved.requires_grad
    assert bool((factor != 1).all())
    fresh = network()
    _, theirs = slim(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(theirs, factor) and theirs.requires_grad


def test_a_copy_has_its_own() -> None:
    model = network()
    pruner, factor = slim(model)
    copied = copy.deepcopy(model)
    train(pruner, torch.optim.SGD(model.parameters(), 0.1), range(2))
    (theirs,) = [buffer for name, buffer in copied.named_buffers() if name.endswith("factor")]
    assert theirs is not factor and theirs.is_leaf and theirs.requires_grad
    assert bool((theirs == 1).all()) and bool((factor != 1).all())


@pytest.mark.parametrize("move", [lambda model: model.float(), lambda model: model.cpu()])
def test_a_moved_model_keeps_the_very_tensors_that_are_learned(move: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    pruner, factor = slim(model)
    pruner.chain.training_step(lambda: model(batch_of(0)).sum(), None).backward()
    move(model)
    (theirs,) = [buffer for name, buffer in model.named_buffers() if name.endswith("factor")]
    parameter = next(model.parameters())
    assert theirs is factor and factor.is_leaf and factor.requires_grad
    assert factor.grad is not None
    assert {(each.dtype, each.device) for each in (factor, factor.grad)} == {(parameter.dtype, parameter.device)}


def test_in_the_precision_that_the_model_was_moved_to_it_goes_on_learning() -> None:
    model = network().float()
    pruner, factor = slim(model)
    model.double()
    train(pruner, torch.optim.SGD(model.parameters(), 0.1), range(2))
    assert factor.dtype == torch.float64 and bool((factor != 1).all())


SCHEDULERS: list[Callable[[Any], LRScheduler]] = [
    lambda optimizer: LambdaLR(optimizer, [lambda step: 0.5**step]),
    lambda optimizer: OneCycleLR(optimizer, max_lr=[0.1], total_steps=10),
]


@pytest.mark.parametrize("make", SCHEDULERS, ids=["LambdaLR", "OneCycleLR"])
def test_the_users_schedule_knows_his_own_groups_alone(make: Callable[[Any], LRScheduler]) -> None:
    model = network()
    pruner, factor = slim(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(pruner, optimizer, range(4), make(optimizer))
    assert len(optimizer.param_groups) == 1
    assert bool((factor != 1).all())


def test_weight_decay_of_the_users_optimizer_leaves_it_alone() -> None:
    found = []
    for decay in (0.0, 0.9):
        model = network()
        pruner, factor = slim(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=decay)
        train(pruner, optimizer, range(3))
        assert id(factor) not in {id(p) for group in optimizer.param_groups for p in group["params"]}
        found.append(factor.clone())
    assert torch.equal(*found)
    pruner, factor = slim(network())
    with torch.no_grad():
        factor.fill_(0.5)
    pruner.regular_scale = 0.0
    train(pruner, torch.optim.AdamW(pruner.model[2].parameters(), lr=0.1, weight_decay=0.9), range(1))
    # Adam's first step is the learning rate in the gradient's direction, whatever its size.
    assert (factor - 0.5).abs().tolist() == pytest.approx([0.01] * 4, rel=1e-3)


def test_clipping_the_users_gradients_leaves_it_alone() -> None:
    model = network()
    pruner, factor = slim(model)
    pruner.chain.training_step(lambda: model(batch_of(0)).square().mean(), None).backward()
    assert factor.grad is not None
    before = factor.grad.clone()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert torch.equal(factor.grad, before)


def test_what_joins_later_leaves_the_momenta_of_the_others() -> None:
    learned, alone = LearnedTensors(), LearnedTensors()
    first, lonely, later = (torch.ones(2, requires_grad=True) for _ in range(3))
    learned.add([first])
    alone.add([lonely])
    for step in range(4):
        if step == 2:
            learned.add([later, first])
        for tensor in (first, lonely, later):
            tensor.grad = torch.tensor([1.0, -3.0]) * (step + 1)
        learned.step()
        alone.step()
    assert torch.equal(first, lonely)
    assert not torch.equal(later, torch.ones(2))


def test_it_is_resumed_exactly() -> None:
    def run(model: nn.Module) -> tuple[SlimPruner, Tensor, Any]:
        pruner, factor = slim(model, 6)
        return pruner, factor, torch.optim.SGD(model.parameters(), 0.1)

    undisturbed, expected, optimizer = run(network())
    train(undisturbed, optimizer, range(8))
    killed, _, optimizer = run(network())
    train(killed, optimizer, range(3))
    resumed, factor, again = run(network())
    resumed.model.load_state_dict(killed.model.state_dict())
    resumed.chain.load_state_dict(killed.chain.state_dict())
    again.load_state_dict(optimizer.state_dict())
    train(resumed, again, range(3, 8))
    assert torch.equal(factor, expected)
    without = run(network())
    without[0].model.load_state_dict(killed.model.state_dict())
    without[0].chain.load_state_dict({**killed.chain.state_dict(), "learned": {}})
    without[2].load_state_dict(optimizer.state_dict())
    train(without[0], without[2], range(3, 8))
    assert not torch.equal(without[1], expected)


class Pair(Learns):
    def __init__(self) -> None:
        super().__init__()
        self.register_learned("first", torch.zeros(2))
        self.register_learned("second", torch.zeros(3, dtype=torch.float64))


def gradients_on_a_rank(rank: int, world: int) -> list[list[float]]:
    pair, learned = Pair(), LearnedTensors()
    learned.add(pair.learned().values())
    pair.first.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        pair.second.grad = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)
    learned.reduce_gradients()
    return [tensor.grad.tolist() for tensor in pair.learned().values()]


def test_ranks_step_by_the_mean_of_their_gradients() -> None:
    # A rank that didn't use the second one counts as 0.
    assert on_ranks(2, gradients_on_a_rank) == [[[1.5, 3.0], [1.0, 2.0, 4.0]]] * 2


def factors_on_a_rank(rank: int, world: int) -> list[list[float]]:
    model = network()
    pruner, factor = slim(model, 2)
    model[1].eval()  # each rank's own statistics would make another batch norm of it
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = []
    with pruner.chain.run(RunContext([optimizer])):
        for number in range(4):
            optimizer.zero_grad()
            # Two forward passes before their backward passes, as some losses need. In torch 2.11, DDP's broadcast of
            # buffers breaks that for networks that have some.
            batch = batch_of(number)[part]
            other = (lambda: wrapped(-batch)) if TWO_PASSES else lambda: 1.0  # noqa: B023
            step = lambda: (wrapped(batch) - other()).square().mean()  # noqa: B023, E731
            pruner.chain.training_step(step, None).backward()
            optimizer.step()
            found.append(factor.tolist())
    return [*found, pruner.get_masks()["1"]["weight"].tolist()]


def test_under_ddp_factors_are_bitwise_alike_and_as_in_one_process() -> None:
    first, second = on_ranks(2, factors_on_a_rank)
    alone = factors_on_a_rank(0, 1)
    assert first == second
    assert sorted(first[-1]) == [0, 0, 1, 1]
    assert first[-1] == alone[-1]
    assert torch.tensor(first).allclose(torch.tensor(alone), rtol=1e-9, atol=1e-12)


def translators_on_a_rank(rank: int, world: int) -> dict[str, Any]:
    model = network()
    model[1].eval()
    teacher = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)).double()
    with torch.no_grad():
        for index, parameter in enumerate(teacher.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) + index)
    distiller = Adaptive1dLayerwiseDistiller(
        model, [{"op_names": ["2"]}], None, teacher, lambda batch, teacher: teacher(batch)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    with distiller.chain.run(RunContext([optimizer])):
        for number in range(3):
            optimizer.zero_grad()
            batch = batch_of(number)[part]
            distiller.chain.training_step(lambda: wrapped(batch).square().mean(), batch).backward()  # noqa: B023
            optimizer.step()
    (translator,) = distiller.translators.values()
    return {"weight": translator.weight.tolist(), "student": model[2].weight.tolist()}


def test_what_a_side_loss_alone_uses_trains_under_ddp() -> None:
    first, second = on_ranks(2, translators_on_a_rank)
    alone = translators_on_a_rank(0, 1)
    assert first == second
    for name, value in alone.items():
        assert torch.tensor(first[name]).allclose(torch.tensor(value), rtol=1e-6, atol=1e-9), name
    assert torch.tensor(alone["weight"]).shape == (5, 2)


def test_a_step_that_a_gradient_scaler_skips_leaves_nothing_behind() -> None:
    """The scaler halves its scale and leaves the step out; the next one is that of an unscaled training."""
    found = []
    for scaled in (False, True):
        model = network()
        pruner, factor = slim(model, 9)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        with pruner.chain.run(RunContext([optimizer])):
            for overflows in (True, False) if scaled else (False,):
                optimizer.zero_grad()
                factor_of_loss = torch.inf if overflows else 1.0
                step = lambda: model(batch_of(0)).square().mean() * factor_of_loss  # noqa: B023, E731
                scaler.scale(pruner.chain.training_step(step, None)).backward()
                scaler.step(optimizer)
                scaler.update()
        assert pruner.chain.step == 1
        found.append(factor.detach().clone())
    assert not torch.equal(found[0], torch.ones_like(found[0]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)
