"""How a compressor trains the model in a plain script or under torchrun: the user's own training function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from raycomp.core.parts import replace_output
from raycomp.errors import CompressionError

if TYPE_CHECKING:
    from raycomp.core.chain import Chain

TrainingStep = Callable[..., Any]


class TorchEvaluator:
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
        dummy_input: an example input, kept for the user's speedup call.
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

    def train(self, chain: Chain, max_steps: int | None, max_epochs: int | None) -> None:
        """Runs the user's training function with all compressors of `chain` taking part.

        Parameters that the compressors learn and no optimizer holds join the first optimizer.
        """
        optimizers = [self.optimizers] if isinstance(self.optimizers, Optimizer) else list(self.optimizers)
        _add_learned_parameters(chain, optimizers)

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = self.training_step(batch, *args, **kwargs)
            return _with_loss(output, lambda loss: chain.loss(loss, batch))

        with chain.run(optimizers):
            self.training_func(chain.model, self.optimizers, training_step, self.lr_schedulers, max_steps, max_epochs)

    def evaluate(self, model: nn.Module) -> Any:
        """The user's metric of `model`.

        Raises:
            CompressionError: the evaluator has no `evaluating_func`.
        """
        if self.evaluating_func is None:
            raise CompressionError("this evaluator has no evaluating_func")
        return self.evaluating_func(model)


def _with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    found = False

    def changed(loss: Any) -> Any:
        nonlocal found
        found = isinstance(loss, Tensor)
        return change(loss) if found else loss

    output = replace_output(output, "loss" if isinstance(output, Mapping) else "0", changed)
    if not found:
        raise CompressionError(
            f"training_step returned {type(output).__name__} without a loss",
            remedy="return the loss, (loss, …), or a mapping that holds it as 'loss'",
        )
    return output


def _add_learned_parameters(chain: Chain, optimizers: Sequence[Optimizer]) -> None:
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trainable = (p for target in chain.space.targets.values() for p in target.parameters() if p.requires_grad)
    learned = [p for p in trainable if id(p) not in held]
    if learned:
        optimizers[0].add_param_group({"params": learned})
