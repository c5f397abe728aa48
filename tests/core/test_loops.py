"""Loops as users write them: closures, validation by the training step, several rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.core.moments import RunContext
from raycomp.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from raycomp.errors import CompressionError, ConfigError
from raycomp.pruning import AGPPruner, L1NormPruner, LotteryTicketPruner, SlimPruner, TaylorPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer

NORM = [{"op_names": ["1"], "target_names": ["weight"], "sparse_ratio": 0.5}]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def batch_of(number: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(number))


def trained(closure: bool, steps: int = 4) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    model = network()
    slim = SlimPruner(model, NORM, training_steps=3, regular_scale=0.1)
    taylor = TaylorPruner.from_compressor(slim, [{"op_names": ["0"], "sparse_ratio": 0.5}], 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with slim.chain.run(RunContext([optimizer])):
        for number in range(steps):

            def backward(number: int = number) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = slim.chain.training_step(lambda: model(batch_of(number)).square().mean(), None)
                loss.backward()
                return loss

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
    return slim.chain.users_state(), slim.get_masks()["1"]["weight"], taylor.get_masks()["0"]["weight"]


def test_a_closure_trains_as_a_plain_loop_does() -> None:
    plain, closed = trained(closure=False), trained(closure=True)
    assert {name: value.tolist() for name, value in plain[0].items()} == {
        name: value.tolist() for name, value in closed[0].items()
    }
    for one, other in zip(plain[1:], closed[1:], strict=True):
        assert one.mean() == 0.5
        assert torch.equal(one, other)


def test_an_optimizer_that_evaluates_its_closure_often_is_refused() -> None:
    model = network()
    pruner = TaylorPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], training_steps=2)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch_of(0)).square().mean()
        loss.backward()
        return loss

    with pruner.chain.run([optimizer]), pytest.raises(CompressionError, match="several times"):
        optimizer.step(closure)


def test_a_validation_loss_by_the_training_step_is_no_step() -> None:
    model, teacher = network(), network()
    losses = []

    def train(model: nn.Module, optimizer: Any, training_step: Any, *_: Any) -> None:
        for number in range(3):
            optimizer.zero_grad()
            training_step(batch_of(number), model).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                losses.append((float(training_step(batch_of(9), model)), float(model(batch_of(9)).square().mean())))
            model.train()

    evaluator = TorchEvaluator(
        train, torch.optim.SGD(model.parameters(), 0.1), lambda batch, model: model(batch).square().mean()
    )
    DynamicLayerwiseDistiller(model, [{"op_names": ["2"]}], evaluator, teacher, lambda batch, t: t(batch)).compress(3)
    assert all(by_step == plain for by_step, plain in losses)


def test_a_rewound_round_begins_as_the_first_one_did() -> None:
    """Factors are 1 again, the weight's scale is the first weight's, and an activation's range is forgotten."""
    model = network()
    slim = SlimPruner(model, NORM, training_steps=2)
    tickets = LotteryTicketPruner(slim, 2)
    entries = [{"op_names": ["2"], "target_names": ["weight", "_input_"]}]
    quantizer = QATQuantizer.from_compressor(tickets, entries)
    scale = float(model[2].weight.detach().abs().max()) / 127
    seen: list[tuple[list[float], float, bool]] = []

    def train(model: nn.Module, optimizer: Any, training_step: Any, *_: Any) -> None:
        (factor,), weight, values = slim.factors.values(), *quantizer.quantizers.values()
        seen.append((factor.factor.tolist(), float(weight.scale), values.active))
        for number in range(3):
            optimizer.zero_grad()
            (training_step(batch_of(number), model) * 10).backward()
            optimizer.step()
        assert values.active

    evaluator = TorchEvaluator(
        train, torch.optim.SGD(model.parameters(), 0.1), lambda batch, model: model(batch).square().mean()
    )
    slim.chain.evaluator = evaluator
    slim.compress(3)
    assert len(seen) == 3
    for factors, found, active in seen:
        assert factors == [1.0] * 4
        assert found == pytest.approx(scale, rel=1e-6)
        assert not active


@pytest.mark.parametrize(
    "make",
    [
        lambda model: TaylorPruner(model, NORM, training_steps=0),
        lambda model: SlimPruner(model, NORM, training_steps=0),
        lambda model: LotteryTicketPruner(L1NormPruner(model, NORM), 0),
        lambda model: AGPPruner(L1NormPruner(model, NORM), 0, 3),
        lambda model: AGPPruner(L1NormPruner(model, NORM), 3, 0),
        lambda model: PtqQuantizer(model, [{"op_names": ["0"]}], calibration_steps=0),
    ],
)
def test_counts_of_nothing_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="got 0"):
        make(network())


def test_what_is_refused_leaves_nothing_behind() -> None:
    model = network()
    pruner = TaylorPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], training_steps=5)
    with pytest.raises(ConfigError, match="below"):
        AGPPruner(pruner, 2, 3)
    AGPPruner(pruner, 5, 3)
    first = QATQuantizer.from_compressor(pruner, [{"op_names": ["2"], "target_names": ["weight"]}])
    with pytest.raises(ConfigError, match=r"2\.weight is quantized by QATQuantizer"):
        QATQuantizer.from_compressor(first, [{"op_names": ["0", "2"], "target_names": ["weight"]}])
    QATQuantizer.from_compressor(first, [{"op_names": ["0"], "target_names": ["weight"]}])
    with pytest.raises(TypeError, match="training_steps, evaluator"):
        TaylorPruner.from_compressor(first, NORM, 3, None, 4)


def test_masks_of_one_target_are_applied_in_one_way_and_bypassed_ones_count_for_nothing() -> None:
    model = network()
    bypassed = [{"op_names": ["0"], "sparse_ratio": 0.5, "apply_method": "bypass"}]
    pruner = L1NormPruner(model, bypassed)
    with pytest.raises(ConfigError, match="masked by 'bypass' already"):
        L1NormPruner.from_compressor(pruner, [{"op_names": ["0"], "sparse_ratio": 0.25}])
    pruner.compress()
    assert pruner.chain.sparsity() == 0
    L1NormPruner.from_compressor(pruner, [{"op_names": ["2"], "target_names": ["weight"], "sparse_ratio": 0.5}])
    pruner.chain.begun = False
    pruner.chain.begin()
    assert pruner.chain.sparsity() == 0.5


def test_an_optimizer_built_after_attaching_finds_the_users_names() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]
    pruner = L1NormPruner(model, [{"op_names": ["0", "1"], "sparse_ratio": 0.5}])
    with pruner.as_written():
        assert [name for name, _ in model.named_parameters()] == names
        assert isinstance(model[0].weight, nn.Parameter)
    assert not isinstance(model[0].weight, nn.Parameter)


def test_what_the_chain_draws_goes_on_after_a_checkpoint() -> None:
    """Translators that first appear after it are those of an undisturbed training."""
    drawn = []
    for resumed in (False, True):
        distiller = Adaptive1dLayerwiseDistiller(network(), [{"op_names": ["2"]}], None, network(), lambda b, t: t(b))
        torch.rand(3, generator=distiller.chain.generator)
        state = distiller.chain.state_dict()
        if resumed:
            distiller = Adaptive1dLayerwiseDistiller(
                network(), [{"op_names": ["2"]}], None, network(), lambda b, t: t(b)
            )
            distiller.chain.load_state_dict(state)
        drawn.append(torch.rand(3, generator=distiller.chain.generator).tolist())
    assert drawn[0] == drawn[1]


class Counted(torch.optim.Adam):
    """Its step calls its parent's, as many of users' own do; torch hooks both."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.made = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.made += 1
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_its_parents_is_one(with_closure: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    optimizer = Counted(model.parameters())
    pruner = TaylorPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], training_steps=3)
    with pruner.chain.run([optimizer]):
        for _ in range(4):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = model(torch.randn(6, 4)).square().mean()
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    assert (optimizer.made, pruner.chain.step) == (4, 4)
