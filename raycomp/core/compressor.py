"""The base of pruners, quantizers and distillers: construction, fusion, and one call that trains them all."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import nn

from raycomp.config import COMPRESSORS, SelectionEntry, parse_config_list
from raycomp.config.values import shown
from raycomp.core.chain import Chain
from raycomp.core.evaluator import Evaluator
from raycomp.core.model import evaluation_mode
from raycomp.core.moments import Moments
from raycomp.core.public import Public
from raycomp.core.rounds import conduct
from raycomp.core.selection import Kind, Selected, Selection, resolve
from raycomp.errors import CompressionError, ConfigError, Problem

ConfigList = Sequence[Mapping[str, Any] | SelectionEntry] | Selection


class Compressor(Public, Moments, ABC):
    """Compresses a model while the user's training runs.

    Constructing one attaches its targets to the model. A subclass says at which moments it acts by overriding them;
    what it doesn't override does nothing. This class's constructor resolves the config list, checks it and attaches, so
    a subclass sets what these need before it calls it.

    Args:
        model: the model, changed in place; or a `Chain`, to fuse with the compressors on it (see `from_compressor`).
        config_list: dicts that select modules and say how to compress their targets; or the `Selection` that they were
            resolved to before.
        evaluator: how to train; needed by `compress` where the algorithm needs training.

    Raises:
        ConfigError: with everything that is wrong in the arguments or the config list.
    """

    kind: ClassVar[Kind]
    fusion_order: ClassVar[tuple[str, ...]] = ("evaluator",)
    """What `from_compressor` takes by position behind the config list: NNI's order, which isn't the constructor's."""

    def __init__(self, model: nn.Module | Chain, config_list: ConfigList, evaluator: Evaluator | None = None) -> None:
        self.chain = model if isinstance(model, Chain) else Chain(model)
        keep_evaluator(self.chain, evaluator)
        self.selection = self._resolved(config_list)
        self.selected = dict(self.selection.selected)
        self.layouts = self.selection.layouts
        self.check()
        self.chain.register(self)

    @classmethod
    def argument_problems(cls, arguments: Mapping[str, Any]) -> Iterator[Problem]:
        model = arguments.get("model")
        if "model" in arguments and not isinstance(model, nn.Module | Chain):
            yield Problem(f"{cls.__name__}.model", f"got {shown(model)}", "should be a torch.nn.Module")
        yield from evaluator_problems(cls, arguments)
        yield from setting_problems(cls, arguments)

    def _resolved(self, config_list: ConfigList) -> Selection:
        if isinstance(config_list, Selection):
            return config_list
        entries = parse_config_list(self.kind, config_list, where="config_list")
        evaluator = self.chain.evaluator
        example = self.chain.example if self.chain.example is not None else evaluator and evaluator.example
        found = resolve(self.chain.model, self.kind, entries, where="config_list", example=example)
        return self.completed(self.chain.model, found, example)

    @classmethod
    def completed(cls, model: nn.Module, selection: Selection, example: Any) -> Selection:
        """A selection with what else the compressor has to know of the model.

        Args:
            model: the model.
            selection: what the config list selects.
            example: an example input; None where there is none.
        """
        return selection

    @classmethod
    def from_compressor(cls, compressor: Compressor, new_config_list: ConfigList, *args: Any, **kwargs: Any) -> Self:
        """A compressor fused with `compressor` and all that is fused with it already.

        Its other arguments are those of the class, by name or in NNI's order. The evaluator of the earlier compressors
        is kept; one given here is used only where they have none, else a warning says that it isn't.

        Raises:
            TypeError: more positional arguments than there are.
        """
        if len(args) > len(cls.fusion_order):
            raise TypeError(f"{cls.__name__}.from_compressor takes {', '.join(cls.fusion_order)}, not {len(args)} more")
        order = cls.fusion_order
        if args and hasattr(args[0], "calibrate"):
            # The evaluator comes first in the constructors.
            order = ("evaluator", *(name for name in order if name != "evaluator"))
        return cls(compressor.chain, new_config_list, **dict(zip(order, args, strict=False)), **kwargs)

    @property
    def model(self) -> nn.Module:
        """The model under compression."""
        return self.chain.model

    @property
    def evaluator(self) -> Evaluator | None:
        """How all fused compressors train."""
        return self.chain.evaluator

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        """Trains all fused compressors, in as many rounds as they need, and calibrates them.

        Args:
            max_steps, max_epochs: how long a round is, handed to the evaluator's training function. Without them
                compressors that need no training don't train, and a pruner alone trains until its last decision.
                Compressors that only calibrate don't train in any case: `max_steps` is the calibration's length.

        Returns:
            What `result` says.

        Raises:
            CompressionError: there is no evaluator, and a length is given or a fused compressor needs one; or all has
                been trained already, and no length says how much further.
        """
        unlimited = max_steps is None and max_epochs is None
        rounds = self.chain.rounds
        if unlimited and not any(isinstance(each, Compressor) and each is not self for each in self.chain.members):
            max_steps = self.steps_to_go()
        if (max_steps, max_epochs) != (None, None) and self.chain.wants_training:
            rounds = max(rounds, self.chain.round + 1)
        elif 0 < rounds <= self.chain.round:
            message = f"compress() has trained already, {self.chain.step} steps"
            raise CompressionError(message, remedy="to train on, say how long: max_steps or max_epochs")
        told = len(self.chain.notes)
        conduct(self.chain, rounds, max_steps, max_epochs)
        for note in self.chain.notes[told:]:
            warnings.warn(note, stacklevel=2)
        return self.result()

    def wrap_model(self) -> None:
        """Attaches all fused compressors' targets again after `unwrap_model`."""
        self.chain.wrap()

    def as_written(self) -> AbstractContextManager[None]:
        """Within the block the model has the parameters, names and classes that its user gave it: for building an
        optimizer by names or modules after compressors stand on the model."""
        return self.chain.space.as_written()

    def unwrap_model(self) -> None:
        """Commits the masks into the weights and takes all fused compressors off the model."""
        self.chain.unwrap()

    def track_forward(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model once on an example, without gradients and in evaluation mode.

        Afterwards masks of inputs and outputs have the rank that they apply to.
        """
        with evaluation_mode(self.model), torch.no_grad():
            self.model(*args, **kwargs)

    # What a subclass says of itself.

    def steps_to_go(self) -> int | None:
        """The optimizer steps until its last decision; None where the user says how long."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Refuses what can't work, before anything is attached (ConfigError)."""

    def result(self) -> Any:
        """What `compress` returns."""
        return self.model

    def problem(self, selected: Selected, message: str, remedy: str = "") -> ConfigError:
        """An error about one selected target."""
        return ConfigError([Problem(selected.where, f"{selected.target_id}: {message}", remedy)])


def evaluator_problems(cls: type, arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """An evaluator that is none."""
    evaluator = arguments.get("evaluator")
    if evaluator is not None and not isinstance(evaluator, Evaluator):
        remedy = "write TorchEvaluator(training_func, optimizer, training_step)"
        yield Problem(f"{cls.__name__}.evaluator", f"got {shown(evaluator)}", remedy)


def keep_evaluator(chain: Chain, evaluator: Evaluator | None) -> None:
    """One evaluator trains all that is fused: the first."""
    if chain.evaluator is None:
        chain.evaluator = evaluator
    elif evaluator is not None and evaluator is not chain.evaluator:
        message = "the evaluator of the earlier compressors is kept, the one given here is not used: leave it out"
        warnings.warn(message, stacklevel=3)


def setting_problems(cls: type, arguments: Mapping[str, Any]) -> Iterator[Problem]:
    """Arguments that a job file's keys of the same names could not be, either."""
    registered = next((COMPRESSORS[each.__name__] for each in cls.__mro__ if each.__name__ in COMPRESSORS), None)
    return registered.problems(arguments) if registered is not None else iter(())
