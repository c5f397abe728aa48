"""A run whose loss, gradients, weights or statistics are not finite stops, and says where that began."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.errors import NotFiniteError
from raycomp.pruning import L1NormPruner, TaylorPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer

BAD_STEP = 3


class Net(nn.Module):
    """Two layers; the second may be given what the first one didn't give."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.between = between

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.between(torch.relu(self.first(value))))


def batches(count: int = 6, bad: float | None = None) -> list[Tensor]:
    """Of which the third holds a bad value."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(8, 4, generator=generator) for _ in range(count)]
    if bad is not None:
        made[BAD_STEP - 1][0, 0] = bad
    return made


def evaluator(
    model: nn.Module,
    data: list[Tensor],
    loss: Callable[[Tensor], Tensor] = lambda output: output.square().mean(),
    learning_rate: float = 0.01,
) -> TorchEvaluator:
    def train(model: Any, optimizer: Any, step: Any, schedulers: Any, max_steps: int, max_epochs: Any) -> None:
        for number in range(max_steps):
            optimizer.zero_grad()
            step(data[number], model).backward()
            optimizer.step()

    return TorchEvaluator(
        train, torch.optim.SGD(model.parameters(), learning_rate), lambda batch, model: loss(model(batch))
    )


def stopped(model: nn.Module, data: list[Tensor], **more: Any) -> str:
    """What a training under a pruner says."""
    pruner = L1NormPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}], evaluator(model, data, **more))
    with pytest.raises(NotFiniteError) as raised:
        pruner.compress(max_steps=len(data))
    return str(raised.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_batch_is_named_with_its_step(value: float) -> None:
    model = Net()
    message = stopped(model, batches(bad=value))
    assert message.startswith("in step 3 the loss is not finite; it began in the batch")
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())


def test_the_layer_where_it_began_is_named() -> None:
    model = Net()
    nn.init.ones_(model.first.weight)
    data = batches()
    data[2] = torch.full((8, 4), 3e38)
    assert "it began in the layer 'first'" in stopped(model, data, learning_rate=0.0)


def test_what_happens_between_two_layers_is_named_by_the_second() -> None:
    calls = []

    def between(value: Tensor) -> Tensor:
        calls.append(value)
        return value / 0 if len(calls) >= BAD_STEP else value

    assert "it began in what the layer 'second' is given" in stopped(Net(between), batches())


def test_a_loss_that_is_not_finite_while_all_layers_are_is_named() -> None:
    message = stopped(Net(), batches(), loss=lambda output: output.mean() * 0 + torch.tensor(torch.inf))
    assert message.startswith("in step 1 the loss is not finite; it began in the loss")


def test_an_infinite_loss_with_finite_gradients_is_not_passed_over() -> None:
    seen = []

    def loss(output: Tensor) -> Tensor:
        seen.append(output)
        return output.mean() + (torch.inf if len(seen) == BAD_STEP else 0.0)

    assert "in step 3 the loss is not finite" in stopped(Net(), batches(), loss=loss)


def test_gradients_that_alone_are_not_finite_are_named() -> None:
    """The root's slope at 0 is infinite, its value isn't."""
    message = stopped(Net(), batches(), loss=lambda output: (output[0, :1] * 0).sqrt().sum())
    assert message.startswith("in step 1 the gradient of first.weight, first.bias, second.weight, second.bias is not")


def test_weights_that_a_step_made_infinite_are_told_at_the_end() -> None:
    data = batches(1)
    message = stopped(Net(), data, learning_rate=3e38, loss=lambda output: output.sum() * 9)
    assert message.startswith("after step 1 ")
    assert "second.weight" in message


def test_weights_that_a_step_made_infinite_are_told_in_the_next_one() -> None:
    message = stopped(Net(), batches(), learning_rate=3e38, loss=lambda output: output.sum() * 9)
    assert message.startswith("in step 2 the loss is not finite; it began in the weights: ")


def test_the_compressor_where_it_began_is_named() -> None:
    model, teacher = Net(), Net()
    with torch.no_grad():
        teacher.second.weight.fill_(3e38)
    distiller = DynamicLayerwiseDistiller(
        model, [{"op_names": ["second"]}], evaluator(model, batches()), teacher, lambda batch, teacher: teacher(batch)
    )
    with pytest.raises(NotFiniteError, match="what DynamicLayerwiseDistiller adds to the loss is not finite; it began"):
        distiller.compress(max_steps=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantizer", [QATQuantizer, PtqQuantizer])
def test_no_range_is_taken_from_a_bad_value(quantizer: Any, value: float) -> None:
    """Rounding clamps it, so that neither loss nor gradients show it."""
    model = Net()
    config = [{"op_names": ["first"], "target_names": ["_input_"], "quant_dtype": "int8"}]
    made = quantizer(model, config, evaluator(model, batches(bad=value)))
    with pytest.raises(NotFiniteError, match=r"range of first\._input_0|the loss"):
        made.compress(max_steps=6)
    tracked = made.quantizers[next(iter(made.quantizers))]
    assert not tracked.active or bool(tracked.scale.isfinite())


def test_a_step_that_a_scaler_leaves_out_is_no_error() -> None:
    """A GradScaler meets infinite gradients by design, skips the step and lowers its scale."""
    model = Net()
    pruner = TaylorPruner(
        model, [{"op_names": ["first"], "sparse_ratio": 0.5}], evaluator(model, batches()), training_steps=2
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with pruner.chain.run([optimizer]):
        for batch in batches(40):
            optimizer.zero_grad()
            loss = pruner.chain.training_step(lambda batch=batch: model(batch).square().sum(), batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert 0 < pruner.chain.step < 40


def test_an_attention_mask_of_minus_infinity_is_a_finite_training() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.soft, self.second = nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)

        def forward(self, value: Tensor) -> Tensor:
            allowed = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
            return self.second(self.soft(self.first(value) + allowed))

    data = batches(bad=torch.nan)
    assert "began in the batch" in stopped(Masked(), data)
    model = Masked()
    L1NormPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}], evaluator(model, batches())).compress(
        max_steps=4
    )


def test_statistics_that_become_infinite_are_told() -> None:
    """One great, finite value in a batch: its square is no float32, and the norm's output is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    data = batches(4)
    data[2][0, 0] = 3e38
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], evaluator(model, data, learning_rate=0.0))
    with pytest.raises(NotFiniteError, match=r"1\.running_var|the loss|the gradient"):
        pruner.compress(max_steps=4)


def test_a_frozen_mask_of_minus_infinity_is_none_of_the_trainings() -> None:
    class Causal(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.triu(torch.full((4, 4), -torch.inf), 1), requires_grad=False)
            self.register_buffer("other", torch.tensor([torch.inf]))

    model = Causal()
    pruner = L1NormPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}], evaluator(model, batches()))
    pruner.compress(max_steps=4)
    assert pruner.chain.step == 4
