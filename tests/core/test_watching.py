"""Which forward passes count: the training step's own, and no other, whatever mode the model is in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raycomp.core.batch_share import BatchShare, use_share
from raycomp.core.moments import RunContext
from raycomp.core.watching import in_training_step, is_watched, watch
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.errors import CompressionError
from raycomp.evaluators import TorchEvaluator
from raycomp.quantization import QATQuantizer


class Net(nn.Module):
    """Two layers; the first, which is watched, runs under activation checkpointing if it is asked for."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 3)
        self.last = nn.Linear(3, 1)
        self.reentrant = reentrant

    def forward(self, value: Tensor) -> Tensor:
        if self.reentrant is not None:
            # What reaches a reentrant checkpoint must need a gradient, or it gives none.
            value = value.requires_grad_() if self.reentrant else value
            return self.last(checkpoint(self.squashed, value, use_reentrant=self.reentrant))
        return self.last(self.squashed(value))

    def squashed(self, value: Tensor) -> Tensor:
        return torch.tanh(self.inner(value))


def values(largest: float) -> Tensor:
    return torch.tensor([[0.0, 0.5, largest]])


class Watched:
    """A student whose inner layer's input is quantized and whose inner layer's output is distilled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.0)
        self.quantizer = QATQuantizer(model, [{"op_names": ["inner"], "target_names": ["_input_"]}])
        self.distiller = DynamicLayerwiseDistiller.from_compressor(
            self.quantizer, [{"op_names": ["inner"]}], Net(), lambda batch, teacher: teacher(batch)
        )
        self.chain = self.distiller.chain

    def step(self, batch: Tensor) -> Tensor:
        return self.chain.training_step(lambda: self.model(batch).sum(), batch)

    @property
    def recorded(self) -> int:
        (recorder,) = self.distiller.recorders.values()
        return len(recorder.values)

    @property
    def greatest(self) -> float:
        return float(self.quantizer.get_calibration_config()["inner"]["_input_0"]["tracked_max"])


def evaluated(watched: Watched) -> None:
    watched.model.eval()(values(70.0))
    watched.model.train()


def without_gradients(watched: Watched) -> None:
    with torch.no_grad():
        watched.model(values(70.0))


def within_the_step_without_gradients(watched: Watched) -> None:
    with watch("training"), torch.no_grad():
        watched.model(values(70.0))


BESIDE: list[Callable[[Watched], Any]] = [
    evaluated,
    lambda watched: watched.model(values(70.0)),
    without_gradients,
    within_the_step_without_gradients,
]


@pytest.mark.parametrize("beside", BESIDE, ids=["evaluation", "beside the step", "no_grad", "no_grad in the step"])
def test_other_forward_passes_count_for_nothing(beside: Callable[[Watched], Any]) -> None:
    watched = Watched(Net())
    with watched.chain.run(RunContext([watched.optimizer])):
        beside(watched)
        assert watched.recorded == 0
        watched.step(values(2.0)).backward()
        beside(watched)
        assert watched.recorded == 0
        watched.optimizer.step()
    assert watched.greatest == 2


def test_an_idle_ranks_stand_in_has_a_loss_and_no_statistics() -> None:
    watched = Watched(Net())
    with watched.chain.run(RunContext([watched.optimizer])):
        with use_share(BatchShare(0, 4)):
            watched.step(values(70.0)).backward()
        with use_share(BatchShare(4, 4)):
            watched.step(values(2.0)).backward()
        watched.optimizer.step()
    assert watched.greatest == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_does_not_matter(training: bool) -> None:
    watched = Watched(Net())
    watched.model.train(training)
    with watched.chain.run(RunContext([watched.optimizer])):
        watched.step(values(2.0)).backward()
        watched.optimizer.step()
    assert watched.greatest == 2


def test_a_loop_of_ones_own_is_watched_whole() -> None:
    watched = Watched(Net())
    with watched.chain.run([watched.optimizer]):
        watched.chain.loss(watched.model(values(2.0)).sum(), values(2.0)).backward()
        watched.optimizer.step()
    assert watched.greatest == 2
    assert not in_training_step()


@pytest.mark.parametrize("own_loop", [False, True], ids=["training_step", "a loop of one's own"])
def test_recomputation_counts_once(own_loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, recomputing = Watched(Net()), Watched(Net(reentrant=False))
    seen: list[int] = []
    for watched in (plain, recomputing):
        (watcher,) = watched.quantizer.watchers.values()
        updates: list[float] = []
        monkeypatch.setattr(watcher, "update", lambda value, updates=updates: updates.append(float(value.max())))
        forwards: list[int] = []
        watched.model.inner.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        # In a loop of one's own the backward pass, which recomputes, is watched as well.
        with watched.chain.run([watched.optimizer] if own_loop else RunContext([watched.optimizer])):
            for _ in range(2):
                watched.step(values(2.0)).backward()
                assert watched.recorded == 0
        seen.append(len(forwards))
        assert updates == [2, 2]
    assert seen == [2, 4]
    for ours, theirs in zip(plain.model.parameters(), recomputing.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def trained(model: nn.Module, make: Callable[[TorchEvaluator], Any]) -> Any:
    def train(model: nn.Module, optimizer: Any, step: Any, schedulers: Any, max_steps: int, max_epochs: Any) -> None:
        model.eval()  # a loop that freezes batch norms
        for _ in range(max_steps):
            optimizer.zero_grad()
            step(values(2.0), model).backward()
            optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    compressor = make(TorchEvaluator(train, optimizer, lambda batch, model: model(batch).sum()))
    compressor.compress(2, None)
    return compressor


def quantizer_of(model: nn.Module) -> Callable[[TorchEvaluator], QATQuantizer]:
    return lambda evaluator: QATQuantizer(model, [{"op_names": ["inner"], "target_names": ["_input_"]}], evaluator)


def distiller_of(model: nn.Module) -> Callable[[TorchEvaluator], DynamicLayerwiseDistiller]:
    return lambda evaluator: DynamicLayerwiseDistiller(
        model, [{"op_names": ["inner"]}], evaluator, copy.deepcopy(Net()), lambda batch, teacher: teacher(batch)
    )


def test_a_training_function_may_leave_the_model_in_eval_mode() -> None:
    model = Net()
    quantizer = trained(model, quantizer_of(model))
    assert float(quantizer.get_calibration_config()["inner"]["_input_0"]["tracked_max"]) == 2
    model = Net()
    trained(model, distiller_of(model))


def test_reentrant_checkpointing_is_told_with_its_remedy() -> None:
    model = Net(reentrant=True)
    with pytest.raises(CompressionError, match=r"inner._output_0: this module didn't run.*use_reentrant=False"):
        trained(model, distiller_of(model))
    model = Net(reentrant=True)
    with pytest.warns(UserWarning, match=r"no training step passed inner._input_0: not quantized.*use_reentrant=False"):
        trained(model, quantizer_of(model))


def test_a_compiled_forward_pass_beside_the_step_counts_for_nothing() -> None:
    watched = Watched(Net())
    compiled = torch.compile(watched.model, backend="eager")
    with watched.chain.run(RunContext([watched.optimizer])):
        compiled(values(70.0))
        watched.chain.training_step(lambda: compiled(values(2.0)).sum(), values(2.0)).backward()
        compiled(values(70.0))
        assert watched.recorded == 0
        watched.optimizer.step()
    assert watched.greatest == 2


def test_what_is_watched_ends_with_its_block() -> None:
    assert not is_watched("training") and not is_watched("calibration")
    with pytest.raises(KeyError), watch("calibration"):
        assert is_watched("calibration") and not is_watched("training") and not in_training_step()
        with watch("training"):
            assert is_watched("training") and not is_watched("calibration")
        raise KeyError
    assert not is_watched("calibration")
