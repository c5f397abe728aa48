"""The compressors that are fused on one model, and the moments of a training run that they share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from raycomp.core.attach import TargetSpace, is_wrapped
from raycomp.core.batch_share import has_no_items, weighted_loss
from raycomp.core.evaluator import Evaluator
from raycomp.core.finite import FiniteRun, Pass, check_statistics, held_by, spreading
from raycomp.core.learned import LearnedTensors
from raycomp.core.loss import with_loss
from raycomp.core.masks import Masks
from raycomp.core.model import evaluation_mode
from raycomp.core.moments import Calibration, Moment, Moments, RunContext
from raycomp.core.optimizer_steps import around_steps
from raycomp.core.reduction import reduce_, settle_
from raycomp.core.watching import in_training_step, watch
from raycomp.errors import CompressionError

_STATE_VERSION = 2


class Chain:
    """Fused compressors in the order in which they were fused, the innermost first.

    One training run serves them all: `run` hooks the optimizers, `training_step` lets every compressor watch the
    forward pass and add to the loss, and at each moment the statistics of all compressors that have a decision to make
    travel in one flat all-reduce, those of masks before those of ranges.

    Args:
        model: the model under compression, changed in place.
        example: an example input of the model, from which the shapes of inputs and outputs are known.
        seed: of `generator`.

    Raises:
        CompressionError: compressors of another chain stand on the model.
    """

    def __init__(self, model: nn.Module, example: Any = None, seed: int = 0) -> None:
        if is_wrapped(model):
            raise CompressionError(
                "the model is wrapped by another compressor",
                remedy="fuse with it (from_compressor), or take it off first (unwrap_model)",
            )
        self.model = model
        self.example = example
        self.evaluator: Evaluator | None = None
        self.space = TargetSpace(model)
        self.learned = LearnedTensors()
        self.generator = torch.Generator().manual_seed(seed)
        """Draws the same on every rank, and goes on from a checkpoint."""
        self.members: list[Moments] = []
        self.notes: tuple[str, ...] = ()
        self.batch = 0
        """Counts the (micro-)batches whose loss was taken: what members do in common for one is done once."""
        self.step = 0
        self.steps_in_round = 0
        self.round = 0
        self.begun = False
        self.calibrated = False
        self.finite = FiniteRun(self.space, self.learned)
        self._outputs: list[Tensor] = []
        self._origin: dict[str, Tensor] = {}
        self._common: dict[object, Any] = {}

    # Who stands on the model.

    def register(self, member: Moments) -> None:
        """Adds a compressor, or masks to keep, behind those that are there, and attaches its targets."""
        member.attach()
        self.space.keep_from_ddp()
        self.members.append(member)

    def wrap(self) -> None:
        """Attaches every compressor's targets again after `unwrap`."""
        if not self.space.targets:
            for member in self.members:
                member.attach()
            self.space.keep_from_ddp()

    def unwrap(self) -> None:
        """Commits factors and masks into the weights, zeros where masked, and takes everything off the model."""
        for member in self.members:
            member.commit()
        self.space.detach()

    def common(self, key: object, make: Callable[[], Any]) -> Any:
        """What several compressors of this chain use in common: made once for each key."""
        if key not in self._common:
            self._common[key] = make()
        return self._common[key]

    # What they need.

    @property
    def rounds(self) -> int:
        """Training runs that the compressors need, 0 where none of them needs any."""
        return max((member.rounds for member in self.members), default=0)

    def epochs_of(self, round: int) -> int | None:
        """How many epochs a round of training has (counted from 0); None where the user says how long it is."""
        said = [epochs for member in self.members if (epochs := member.epochs_of(round)) is not None]
        return max(said, default=None)

    @property
    def wants_training(self) -> bool:
        """Whether a stage with these compressors trains; one that only calibrates doesn't."""
        return any(member.wants_training for member in self.members)

    @property
    def calibrates(self) -> bool:
        """Whether a calibration has to follow the training."""
        return any(member.calibrates for member in self.members)

    @property
    def calibration_steps(self) -> int | None:
        """Batches of the calibration; None for one pass over the training data."""
        wanted = [member.calibration_steps for member in self.members if member.calibrates]
        return None if None in wanted else max(wanted, default=None)  # type: ignore[type-var]

    # The moments of a run.

    @contextmanager
    def run(self, context: RunContext | Sequence[Optimizer]) -> Iterator[None]:
        """A training run: within the block every step of the optimizers is a step of the compressors.

        See `around_steps` for several optimizers, and for closures. A loop that gives its optimizers alone, and calls
        `loss` itself, is watched whole.

        Raises:
            CompressionError: no optimizer, or the model is unwrapped.
        """
        own_loop = not isinstance(context, RunContext)
        context = replace(context if isinstance(context, RunContext) else RunContext(context), generator=self.generator)
        if not context.optimizers:
            raise CompressionError("a training run needs an optimizer")
        self.begin()
        self.finite.begin(context.optimizers)
        begun: list[Moments] = []
        hook = self.model.register_forward_hook(self._keep_outputs)
        try:
            with around_steps(context.optimizers, self._before_step, self._after_step):
                for member in self.members:
                    member.begin_run(context)
                    begun.append(member)
                with watch("training") if own_loop else nullcontext():
                    yield
        finally:
            hook.remove()
            for member in begun:
                member.end_run()

    def begin(self) -> None:
        """Makes the decisions that need no training step; a resumed run has made them.

        Raises:
            CompressionError: the model is unwrapped.
        """
        if not self.space.targets:
            raise CompressionError("the model is unwrapped", remedy="call wrap_model() first")
        if not self.begun:
            self.begun = True
            if self.rounds > 1:
                self._origin = self.users_state()
            self._decide(Moment("begin", 0))

    def training_step(self, step_fn: Callable[[], Any], batch: Any) -> Any:
        """Runs a training step of the user's: its forward pass is watched, and every compressor may add to its loss.

        Args:
            step_fn: gives the loss, a tuple that holds it first, or a mapping that holds it as "loss".
            batch: what the step is of.

        Returns:
            What `step_fn` gave, with the loss that is to be differentiated in its place.
        """
        if not torch.is_grad_enabled():
            # A loop that takes its validation loss by the same function.
            return step_fn()
        if all(parameter.grad is None for parameter in self.model.parameters()):
            # A new step begins; the last one was perhaps never made, as a GradScaler's is not after an overflow.
            self.learned.drop_gradients()
            self.finite.begin_step()
        self._outputs = []
        with watch("training"):
            output = step_fn()
        return with_loss(output, lambda loss: self.loss(loss, batch, step_fn))

    def loss(self, loss: Tensor, batch: Any, step_fn: Callable[[], Any] | None = None) -> Tensor:
        """The loss that is differentiated: the task's own and what every compressor adds, as this rank's part of those
        of the global batch (see `BatchShare`).

        Args:
            loss: the task's.
            batch: what it is of.
            step_fn: repeats the forward pass.
        """
        self.batch += 1
        loss = weighted_loss(loss, self._outputs)
        losses = {"the loss": loss.detach()}
        for member in self.members:
            if member.loss_weight != 1:
                loss = loss * member.loss_weight
        for member in self.members:
            term = member.loss_term(batch)
            if term is not None:
                losses[f"what {type(member).__name__} adds to the loss"] = term.detach()
                loss = loss + term
        self.finite.passed(Pass(step_fn, losses))
        return spreading(loss)

    def _keep_outputs(self, model: nn.Module, args: Any, output: Any) -> None:
        """Keeps what the model gives where the task's loss won't do: all but scalars, a loss of its own among them."""
        if has_no_items() and in_training_step():
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            self._outputs += [leaf for leaf in leaves if leaf.requires_grad and leaf.ndim]

    def end_round(self) -> None:
        """The last step of a round of training is done: the decisions that fall there are made."""
        self.finite.check_weights(self.step)
        self._decide(Moment("round", self.step, self.round))
        self._take_notes()
        self.round += 1
        self.steps_in_round = 0

    def rewind(self) -> None:
        """Before another round: the user's weights and statistics as they were before the first one, where a compressor
        wants it, and what compressors learn and track as well; that has a fresh optimizer in any case."""
        if any(member.rewinds for member in self.members):
            self.restore_users_state(self._origin)
            self.learned.rewind()
            for member in self.members:
                member.rewind()
        self.learned.reset()
        self._decide(Moment("begin", self.step, self.round))

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """A calibration; when it ends without an error, the decisions that rest on it are made."""
        with evaluation_mode(self.model):
            yield
            self._decide(Moment("calibrated", self.step, self.round))
        self.calibrated = True
        self._take_notes()

    def calibration_step(self, step_fn: Callable[[], Any]) -> Any:
        """Runs a step forward only: its forward pass is watched, in evaluation mode and without gradients."""
        self.model.eval()
        with torch.no_grad(), watch("calibration"):
            return step_fn()

    def _before_step(self) -> None:
        """The gradients are there, reduced over the workers; the weights are those that gave them."""
        self.learned.reduce_gradients()
        self.finite.check_gradients(self.step + 1)
        for member in self.members:
            member.before_step(self.step + 1)

    def _after_step(self) -> None:
        """The optimizer has stepped: decisions that are due are made, on all ranks alike."""
        self.learned.step()
        self.step += 1
        self.steps_in_round += 1
        self._decide(Moment("step", self.step, self.round))

    def _decide(self, moment: Moment) -> None:
        due = [member for member in self.members if member.is_due(moment)]
        for turn in sorted({member.turn for member in due}):
            deciding = [member for member in due if member.turn == turn]
            merged = [statistic for member in deciding for statistic in member.statistics()]
            reduce_(merged)
            check_statistics(merged, moment)
            for member in deciding:
                member.decide(moment)

    def tell(self, notes: Iterable[str]) -> None:
        """Keeps what the user should be told, once."""
        self.notes = tuple(dict.fromkeys([*self.notes, *notes]))

    def _take_notes(self) -> None:
        self.tell(note for member in self.members for note in member.notes())

    # What they have to give.

    def masks(self) -> Masks:
        """{module: {target: mask}}, 1 = keep, in each target's full shape; those of several pruners multiplied."""
        merged = Masks()
        for member in self.members:
            masks = member.get_masks()
            for target_id, mask in masks.by_target():
                merged.put(target_id, mask, masks.method(*target_id))
        return merged

    def calibration(self) -> Calibration:
        """{module: {target: {scale, zero_point, quant_dtype, …}}} of every quantizer."""
        merged: Calibration = {}
        for member in self.members:
            for module, targets in member.get_calibration_config().items():
                merged.setdefault(module, {}).update(targets)
        return merged

    def folds(self) -> list[tuple[str, ...]]:
        """The module names that one host runs as a single operator, as `fuse_names` gives them."""
        return [names for member in self.members for names in member.folds()]

    def sparsity(self) -> float:
        """The fraction of the elements under masks that is masked, where masks apply; 0 without masks."""
        found = self.masks()
        masks = [mask for target_id, mask in found.by_target() if found.method(*target_id) != "bypass"]
        total = sum(mask.numel() for mask in masks)
        return 1 - sum(float(mask.sum()) for mask in masks) / total if total else 0.0

    def users_state(self) -> dict[str, Tensor]:
        """A copy of the state dict of the model as the user wrote it."""
        with self.space.as_written():
            return copy.deepcopy(dict(self.model.state_dict()))

    def restore_users_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over `users_state()`; what compressors keep in the model stays."""
        with self.space.as_written():
            self.model.load_state_dict(state)

    def unheld_parameters(self, optimizers: Sequence[Optimizer]) -> list[str]:
        """The names of trainable parameters that no optimizer holds, and that therefore stay as they are."""
        held = {id(parameter) for parameter in held_by(optimizers)}
        with self.space.as_written():
            named = list(self.model.named_parameters())
        return [name for name, parameter in named if parameter.requires_grad and id(parameter) not in held]

    # Going on later.

    def settle(self) -> None:
        """Merges what the ranks are still gathering, so that rank 0's state holds all of it. A collective: every rank
        calls it before `state_dict`."""
        settle_([statistic for member in self.members for statistic in member.running_statistics()])

    def state_dict(self) -> dict[str, Any]:
        """What the compressors know beside the model's own state dict: the step, schedules, running statistics."""
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "steps_in_round": self.steps_in_round,
            "round": self.round,
            "begun": self.begun,
            "calibrated": self.calibrated,
            "notes": self.notes,
            "generator": self.generator.get_state(),
            "learned": self.learned.state_dict(),
            "origin": self._origin,
            "compressors": [{"class": type(member).__name__, "state": member.state_dict()} for member in self.members],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`; the model's own state dict is loaded beside it.

        Raises:
            CompressionError: the state is of another format or of other compressors.
        """
        saved = [item["class"] for item in state["compressors"]]
        here = [type(member).__name__ for member in self.members]
        if state["version"] != _STATE_VERSION or saved != here:
            raise CompressionError(
                f"the state is version {state['version']} of {saved}, "
                f"these compressors are version {_STATE_VERSION} of {here}"
            )
        self.step, self.round, self.steps_in_round = state["step"], state["round"], state["steps_in_round"]
        self.begun, self.calibrated, self.notes = state["begun"], state["calibrated"], tuple(state["notes"])
        self.generator.set_state(state["generator"])
        self._origin = dict(state["origin"])
        for member, item in zip(self.members, state["compressors"], strict=True):
            member.load_state_dict(item["state"])
        self.learned.load_state_dict(state["learned"])
