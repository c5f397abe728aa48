"""A plain script in NNI's form: the user's training function, compress, speedup, then a distiller."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from raycomp import TorchEvaluator
from raycomp.core.chain import Chain
from raycomp.core.kept_masks import KeptMasks
from raycomp.core.masks import Masks
from raycomp.core.moments import RunContext
from raycomp.core.target import TargetId
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.errors import CompressionError
from raycomp.pruning import AGPPruner, L1NormPruner, LinearPruner, SlimPruner, TaylorPruner
from raycomp.quantization import QATQuantizer
from raycomp.speedup import ModelSpeedup
from tests.contracts.scripts import batch_of, network

HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
LOGITS = [{"op_types": ["Linear"]}]


def training_step(batch: Any, model: nn.Module) -> Any:
    return functional.cross_entropy(model(batch[0]), batch[1])


def teacher_predict(batch: Any, teacher: nn.Module) -> Tensor:
    return teacher(batch[0])


class Script:
    """What a user of NNI has: a training function, and a note of how long it was told to train."""

    def __init__(self, model: nn.Module, step: Callable[..., Any] = training_step) -> None:
        self.lengths: list[tuple[int | None, int | None]] = []
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.evaluator = TorchEvaluator(self.train, self.optimizer, step)
        self.losses: list[float] = []

    def train(
        self,
        model: nn.Module,
        optimizers: Optimizer,
        training_step: Callable[..., Any],
        lr_schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        self.lengths.append((max_steps, max_epochs))
        model.train()
        for step in range(max_steps or 4 * (max_epochs or 1)):
            optimizers.zero_grad()
            output = training_step(batch_of(step), model)
            loss = output if isinstance(output, Tensor) else output["loss"] if isinstance(output, dict) else output[0]
            loss.backward()
            optimizers.step()
            self.losses.append(float(loss.detach()))


def test_nnis_own_sequence_of_prune_speedup_distill() -> None:
    model = network()
    teacher = copy.deepcopy(model)
    pruner = TaylorPruner(model, HALF, Script(model).evaluator, training_steps=3)
    masked, masks = pruner.compress(max_steps=5, max_epochs=None)
    assert masked is model
    pruner.unwrap_model()
    smaller = ModelSpeedup(model, torch.randn(2, 1, 6, 6), masks).speedup_model()
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    script = Script(smaller)
    distiller = DynamicLayerwiseDistiller(smaller, LOGITS, script.evaluator, teacher, teacher_predict, 0.1)
    assert distiller.compress(4, None) is smaller
    distiller.unwrap_model()
    assert len(script.losses) == 4
    assert smaller(torch.randn(2, 1, 6, 6)).shape == (2, 3)


def test_l1_fused_with_a_distiller_does_prune_and_both_train_in_one_run() -> None:
    model = network()
    script = Script(model)
    pruner = L1NormPruner(model, HALF)
    distiller = DynamicLayerwiseDistiller.from_compressor(
        pruner, LOGITS, copy.deepcopy(model), teacher_predict, 0.5, script.evaluator
    )
    distiller.compress(3, None)
    assert float(pruner.get_masks()["stem"]["weight"].mean()) == 0.5
    assert len(script.losses) == 3
    pruner.unwrap_model()
    assert float((model.stem.weight == 0).float().mean()) == 0.5


def test_an_evaluator_given_late_trains_every_parameter_and_serves_every_compressor() -> None:
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = L1NormPruner(model, HALF)
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_types": ["Linear"]}], 0, Script(model).evaluator)
    assert pruner.evaluator is quantizer.evaluator is not None
    pruner.compress(max_steps=2)
    quantizer.unwrap_model()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_the_first_evaluator_stays() -> None:
    model = network()
    first, second = Script(model).evaluator, Script(model).evaluator
    pruner = L1NormPruner(model, HALF, first)
    assert QATQuantizer.from_compressor(pruner, [{"op_types": ["Linear"]}], 0, second).evaluator is first


def test_from_compressor_takes_nnis_orders_of_arguments() -> None:
    model = network()
    evaluator, teacher = Script(model).evaluator, copy.deepcopy(model)
    taylor = TaylorPruner.from_compressor(
        DynamicLayerwiseDistiller(model, LOGITS, evaluator, teacher, teacher_predict), HALF, 3
    )
    scheduled = AGPPruner.from_compressor(taylor, 4, 2)
    quantizer = QATQuantizer.from_compressor(scheduled, [{"op_types": ["Linear"]}], 5)
    norms = L1NormPruner.from_compressor(quantizer, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.25}], evaluator)
    assert (taylor.training_steps, quantizer.quant_start_step) == (3, 5)
    assert [type(c).__name__ for c in norms.chain.members] == [
        "DynamicLayerwiseDistiller",
        "TaylorPruner",
        "QATQuantizer",
        "L1NormPruner",
    ]
    assert norms.evaluator is evaluator


@pytest.mark.parametrize("kind", [TaylorPruner, SlimPruner, QATQuantizer])
def test_from_compressor_takes_ours_and_an_evaluator_alone(kind: Any) -> None:
    norms = [{"op_types": ["BatchNorm2d"], **({} if kind is QATQuantizer else {"sparse_ratio": 0.5})}]
    model = network()
    plain = kind.from_compressor(L1NormPruner(model, HALF), norms)
    assert plain.evaluator is None
    evaluator = Script(model).evaluator
    given = kind.from_compressor(L1NormPruner(network(), HALF), norms, evaluator)
    assert given.evaluator is evaluator
    name = "quant_start_step" if kind is QATQuantizer else "training_steps"
    assert getattr(given, name) == getattr(plain, name)
    scale = [0.5] if kind is SlimPruner else []
    nni = kind.from_compressor(L1NormPruner(network(), HALF), norms, 7, *scale, evaluator)
    assert (getattr(nni, name), nni.evaluator) == (7, evaluator)


def test_compress_without_a_length_trains_until_the_last_decision() -> None:
    model = network()
    script = Script(model)
    TaylorPruner(model, HALF, script.evaluator, training_steps=3).compress()
    assert script.lengths == [(3, None)]
    model = network()
    script = Script(model)
    _, masks = LinearPruner(L1NormPruner(model, HALF), 2, 3, script.evaluator).compress()
    assert script.lengths == [(6, None)]
    assert float(masks["stem"]["weight"].mean()) == 0.5
    model = network()
    script = Script(model)
    chain = Chain(model)
    KeptMasks(chain, Masks({"stem": {"weight": torch.ones_like(model.stem.weight)}}))
    TaylorPruner(chain, HALF, script.evaluator, training_steps=3).compress()
    assert script.lengths == [(3, None)]


def test_a_distiller_trains_as_long_as_the_script_says() -> None:
    model = network()
    script = Script(model)
    DynamicLayerwiseDistiller(model, LOGITS, script.evaluator, copy.deepcopy(model), teacher_predict).compress()
    assert script.lengths == [(None, None)]


def test_l1_alone_needs_no_training_even_where_it_could() -> None:
    model = network()
    script = Script(model)
    _, masks = L1NormPruner(model, HALF, script.evaluator).compress()
    assert script.lengths == []
    assert float(masks["stem"]["weight"].mean()) == 0.5


def test_what_needs_training_says_so() -> None:
    model = network()
    pruner = AGPPruner(L1NormPruner(model, HALF), 2, 2)
    with pytest.raises(CompressionError, match="L1NormPruner needs an evaluator"):
        pruner.compress()
    with pytest.raises(CompressionError, match="training needs an evaluator"):
        L1NormPruner(network(), HALF).compress(max_steps=3)


def test_a_training_that_ends_before_the_goal_is_told() -> None:
    model = network()
    pruner = AGPPruner(L1NormPruner(model, HALF, Script(model).evaluator), 2, 3)
    with pytest.warns(UserWarning, match=r"ended after step 4, the last masks are due after step 6"):
        pruner.compress(max_steps=4)


class Losses(NamedTuple):
    loss: Tensor
    note: str


@pytest.mark.parametrize(
    "form",
    [
        lambda loss: loss,
        lambda loss: (loss, "note"),
        lambda loss: [loss, None],
        lambda loss: Losses(loss, "note"),
        lambda loss: {"note": None, "loss": loss},
    ],
)
def test_a_training_step_may_give_its_loss_in_any_of_nnis_forms(form: Callable[[Tensor], Any]) -> None:
    model = network()
    seen: list[Any] = []
    script = Script(model, lambda batch, model: form(training_step(batch, model)))
    teacher = copy.deepcopy(model)
    distiller = DynamicLayerwiseDistiller(model, LOGITS, script.evaluator, teacher, teacher_predict, 0.0)
    train = script.train
    script.evaluator.training_func = lambda m, o, step, *rest: train(
        m, o, lambda *given: seen.append(step(*given)) or seen[-1], *rest
    )
    distiller.compress(1, None)
    # λ₀ is 0 and the student is the teacher in training mode, so what is left is the distance of their logits.
    assert 0 < script.losses[0] < 0.5
    assert type(seen[0]) is type(form(torch.zeros(())))


def test_a_training_step_without_a_loss_is_refused() -> None:
    model = network()
    script = Script(model, lambda batch, model: SimpleNamespace(loss=training_step(batch, model)))
    with pytest.raises(CompressionError, match="training_step returned SimpleNamespace without a loss"):
        TaylorPruner(model, HALF, script.evaluator, 2).compress()


def test_a_wrapped_model_is_not_wrapped_by_a_stranger() -> None:
    model = network()
    pruner = L1NormPruner(model, HALF)
    with pytest.raises(CompressionError, match="wrapped by another compressor"):
        QATQuantizer(model, [{"op_types": ["Linear"]}])
    pruner.unwrap_model()
    with pytest.raises(CompressionError, match="unwrapped"):
        pruner.compress()
    QATQuantizer(model, [{"op_types": ["Linear"]}])


def test_a_state_of_other_compressors_is_refused() -> None:
    taylor = TaylorPruner(network(), HALF, training_steps=2)
    with pytest.raises(CompressionError, match=r"\['TaylorPruner'\].*\['L1NormPruner'\]"):
        L1NormPruner(network(), HALF).chain.load_state_dict(taylor.chain.state_dict())


def test_tracking_a_forward_pass_changes_no_mode_and_no_statistics() -> None:
    model = network()
    model.train()
    model.stem_norm.eval()
    quantizer = QATQuantizer(model, [{"op_types": ["Linear"]}])
    before = copy.deepcopy(model.state_dict())
    quantizer.track_forward(batch_of(0)[0])
    assert model.training and not model.stem_norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_schedule_tracks_what_its_pruner_tracks() -> None:
    model, seen = network(), []
    pruner = AGPPruner(L1NormPruner(model, HALF), 1, 1)
    model.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    pruner.track_forward(batch_of(0)[0])
    assert seen == [(False, False)]


def test_shapes_of_outputs_are_those_on_the_dummy_input() -> None:
    def shapes(example: Tensor | None) -> set[tuple[int, ...] | None]:
        model = network()
        script = Script(model)
        evaluator = TorchEvaluator(script.train, script.optimizer, training_step, dummy_input=example)
        outputs = [{"op_types": ["Linear"], "target_names": ["_output_"]}]
        before = copy.deepcopy(model.train().state_dict())
        quantizer = QATQuantizer(model, outputs, evaluator=evaluator)
        assert model.training
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
        return {layout.shape for layout in quantizer.layouts.values()}

    images = batch_of(0)[0][:5]
    assert shapes(None) == {None}
    assert shapes(images) == {tuple(network()(images).shape)}


def test_an_evaluator_evaluates() -> None:
    model = network()
    evaluator = TorchEvaluator(
        Script(model).train, torch.optim.SGD(model.parameters(), 0.1), training_step, None, None, lambda model: 0.75
    )
    assert evaluator.evaluate(model) == 0.75
    with pytest.raises(CompressionError, match="no evaluating_func"):
        Script(model).evaluator.evaluate(model)


class Recording:
    """A trainee that notes what it is asked."""

    def __init__(self, model: nn.Module) -> None:
        self.chain = L1NormPruner(model, HALF).chain
        self.model = model
        self.contexts: list[RunContext] = []
        self.ended: list[int] = []

    def run(self, context: RunContext) -> Any:
        self.contexts.append(context)
        return self.chain.run(context)

    def training_step(self, step_fn: Callable[[], Any], batch: Any) -> Any:
        return self.chain.training_step(step_fn, batch)

    def end_round(self) -> None:
        self.ended.append(self.chain.step)
        self.chain.end_round()

    def unheld_parameters(self, optimizers: Any) -> list[str]:
        return self.chain.unheld_parameters(optimizers)


def test_members_are_given_what_the_user_gave() -> None:
    model = network()
    optimizers = [torch.optim.SGD(model.stem.parameters(), 0.1), torch.optim.SGD(model.branch.parameters(), 0.1)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)
    given: list[Any] = []
    evaluator = TorchEvaluator(
        lambda *arguments: given.append(arguments),
        optimizers,
        training_step,
        scheduler,
        batch_of(0)[0],
        lambda model: 0.5,
    )
    trainee = Recording(model)
    with pytest.warns(UserWarning, match=r"no optimizer holds stem_norm.weight, .*: they will not train"):
        evaluator.train(trainee, 5, None)
    (context,) = trainee.contexts
    assert (list(context.optimizers), list(context.schedulers), context.total_steps) == (optimizers, [scheduler], 5)
    assert torch.equal(context.example, batch_of(0)[0])
    assert context.evaluate is not None and context.evaluate() == 0.5
    assert trainee.ended == [0]
    ((first, second, _, third, *lengths),) = given
    assert (first, second, third, lengths) == (model, optimizers, scheduler, [5, None])


def test_a_reset_gives_optimizers_and_schedules_as_they_were_when_it_was_made() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    start = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
    evaluator = TorchEvaluator(lambda *_: None, [optimizer], training_step, [scheduler])
    for _ in range(2):
        training_step(batch_of(0), model).backward()
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert optimizer.state_dict()["state"]
        evaluator.reset()
        assert [optimizer.state_dict(), scheduler.state_dict()] == start
        assert scheduler.get_last_lr() == [0.1]


def test_the_dummy_input_tells_shapes() -> None:
    model = network()
    evaluator = TorchEvaluator(
        Script(model).train, torch.optim.SGD(model.parameters(), 0.1), training_step, dummy_input=batch_of(0)[0]
    )
    entry = {
        "op_names": ["act"],
        "target_names": ["_output_"],
        "align": {"module_name": "stem", "target_name": "weight"},
    }
    pruner = L1NormPruner(model, [*HALF, entry], evaluator)
    assert pruner.layouts[TargetId("act", "_output_0")].shape == (12, 8, 6, 6)
    masks = pruner.compress()[1]
    assert masks["act"]["_output_0"].shape == (1, 8, 1, 1)


def test_notes_are_told_once() -> None:
    model = network()
    pruner = AGPPruner(L1NormPruner(model, HALF, Script(model).evaluator), 2, 9)
    with pytest.warns(UserWarning) as told:
        pruner.compress(max_steps=4)
    assert [str(warning.message) for warning in told] == list(pruner.chain.notes)
    assert len(told) == 1


def trained_in(*lengths: int) -> list[Any]:
    """The steps, the schedule's position and the weights after `compress` calls of these lengths."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(model: nn.Module, optimizer: Any, step: Any, scheduler: Any, steps: int, epochs: Any) -> None:
        for number in range(pruner.chain.step, pruner.chain.step + steps):
            optimizer.zero_grad()
            step(batch_of(number), model).backward()
            optimizer.step()
            scheduler.step()

    evaluator = TorchEvaluator(train, optimizer, training_step, scheduler)
    pruner = AGPPruner(TaylorPruner(model, HALF, evaluator, 2), 2, 4)
    for length in lengths:
        pruner.compress(length)
    return [pruner.chain.step, scheduler.last_epoch, *pruner.chain.users_state().values()]


@pytest.mark.filterwarnings("ignore:.*the goal is not reached")
def test_training_in_two_parts_is_training_once() -> None:
    once, parts = trained_in(8), trained_in(3, 5)
    assert once[:2] == parts[:2] == [8, 8]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(once[2:], parts[2:]))
