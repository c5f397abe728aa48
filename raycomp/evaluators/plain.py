"""How a compressor trains the model in a plain script or under torchrun: the user's own training function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raycomp.config.values import shown
from raycomp.core.evaluator import Trainee
from raycomp.core.loss import with_loss
from raycomp.core.moments import RunContext
from raycomp.core.public import Public
from raycomp.errors import CompressionError, Problem

TrainingStep = Callable[..., Any]


class TorchEvaluator(Public):
    """The user's training and evaluation, in NNI's form.

    The training function may wrap the model in DDP: hooks and parametrizations stand on the inner modules, and where a
    process group is initialised every decision is reduced over it. Optimizers are plain torch optimizers.

    Args:
        training_func: `training_func(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)`; it must
            use the `training_step` that it is given, and end after `max_steps` or `max_epochs`, whichever is given.
        optimizers: one optimizer or a list of them over the model's parameters.
        training_step: `training_step(batch, model, …)` gives the loss, a tuple that holds it first, or a mapping that
            holds it as "loss".
        lr_schedulers: handed to `training_func`.
        dummy_input: an example input: shapes of inputs and outputs are known from it.
        evaluating_func: `evaluating_func(model)` gives the metric.
    """

    def __init__(
        self,
        training_func: Callable[..., None],
        optimizers: Optimizer | Sequence[Optimizer],
        training_step: TrainingStep,
        lr_schedulers: LRScheduler | Sequence[LRScheduler] | None = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.training_func = training_func
        self.optimizers = optimizers
        self.training_step = training_step
        self.lr_schedulers = lr_schedulers
        self.dummy_input = dummy_input
        self.evaluating_func = evaluating_func
        self._fresh = self._states()

    @classmethod
    def argument_problems(cls, arguments: Mapping[str, Any]) -> Iterator[Problem]:
        for name in ("training_func", "training_step", "evaluating_func"):
            value = arguments.get(name)
            if name in arguments and not callable(value) and (value, name) != (None, "evaluating_func"):
                yield Problem(f"TorchEvaluator.{name}", f"got {shown(value)}", "should be a function")
        given = arguments.get("optimizers", ())
        optimizers = given if isinstance(given, list | tuple) else [given]
        if not all(isinstance(each, Optimizer) for each in optimizers):
            remedy = "should be an optimizer of torch.optim, or a list of them"
            yield Problem("TorchEvaluator.optimizers", f"got {shown(given)}", remedy)

    @property
    def example(self) -> Any:
        """The dummy input."""
        return self.dummy_input

    def train(self, trainee: Trainee, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Runs the user's training function with all compressors taking part.

        Trainable parameters that no optimizer holds are named in a warning.
        """
        self._warn_of_unheld(trainee)

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            _refuse_criterion(batch, *args, **kwargs)
            return trainee.training_step(lambda: self.training_step(batch, *args, **kwargs), batch)

        evaluate = None if self.evaluating_func is None else lambda: self.evaluate(trainee.model)
        context = RunContext(
            self._optimizers, self._schedulers, total_steps=max_steps, example=self.example, evaluate=evaluate
        )
        with trainee.run(context):
            self._train(trainee.model, training_step, max_steps, max_epochs)
            trainee.end_round()

    def calibrate(self, trainee: Trainee, max_steps: int | None = None) -> None:
        """Runs the user's training function for its batches alone: the model is in evaluation mode, optimizer steps
        change nothing, and afterwards weights, optimizers and schedules are as before."""
        weights, states = trainee.users_state(), self._states()
        with trainee.calibrating():

            def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
                _refuse_criterion(batch, *args, **kwargs)
                output = trainee.calibration_step(lambda: self.training_step(batch, *args, **kwargs))
                return with_loss(output, _without_gradient)

            with _no_updates(self._optimizers):
                self._train(trainee.model, training_step, max_steps, None if max_steps else 1)
            trainee.restore_users_state(weights)
            self._restore(states)

    def evaluate(self, model: nn.Module) -> Any:
        """The user's metric of `model`.

        Raises:
            CompressionError: the evaluator has no `evaluating_func`.
        """
        if self.evaluating_func is None:
            raise CompressionError("this evaluator has no evaluating_func")
        return self.evaluating_func(model)

    def reset(self) -> None:
        """Optimizers and schedules are as they were when the evaluator was made."""
        self._restore(copy.deepcopy(self._fresh))

    def _train(self, model: nn.Module, training_step: TrainingStep, max_steps: int | None, epochs: int | None) -> None:
        self.training_func(model, self.optimizers, training_step, self.lr_schedulers, max_steps, epochs)

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [self.optimizers] if isinstance(self.optimizers, Optimizer) else list(self.optimizers)

    @property
    def _schedulers(self) -> list[LRScheduler]:
        schedulers = self.lr_schedulers
        return [] if schedulers is None else [schedulers] if not isinstance(schedulers, Sequence) else list(schedulers)

    @property
    def _stateful(self) -> list[Any]:
        return [*self._optimizers, *self._schedulers]

    def _states(self) -> list[dict[str, Any]]:
        return [copy.deepcopy(each.state_dict()) for each in self._stateful]

    def _restore(self, states: Sequence[dict[str, Any]]) -> None:
        for each, state in zip(self._stateful, states, strict=True):
            each.load_state_dict(state)

    def _warn_of_unheld(self, trainee: Trainee) -> None:
        unheld = trainee.unheld_parameters(self._optimizers)
        if unheld:
            warnings.warn(f"no optimizer holds {', '.join(unheld[:8])}: they will not train", stacklevel=3)


@contextmanager
def _no_updates(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Within the block the optimizers' steps find no gradients: neither momentum nor weight decay moves a weight."""
    handles = [optimizer.register_step_pre_hook(lambda each, *_: each.zero_grad()) for optimizer in optimizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_criterion(batch: Any, *args: Any, **kwargs: Any) -> None:
    """An output with its target is no batch with its model: the forward pass was none of the step."""
    given = (*args, *kwargs.values())
    if isinstance(batch, Tensor) and batch.grad_fn is not None and not any(isinstance(x, nn.Module) for x in given):
        message = "training_step is given the model's output, as NNI 2's criterion was"
        remedy = "write training_step(batch, model), which runs the model and gives the loss"
        raise CompressionError(message, remedy=remedy)


def _without_gradient(loss: Tensor) -> Tensor:
    """The loss's value as something that can be differentiated without effect."""
    return loss.detach().requires_grad_()
