"""Pruners that search for how much each layer loses: the base."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from raycomp.core.evaluator import Evaluator
from raycomp.core.masks import Masks
from raycomp.core.model import evaluation_mode
from raycomp.core.selection import Selection
from raycomp.errors import CompressionError
from raycomp.pruning.bases.around import AroundPruner
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.search.search import Judge, Judged, Search, searched
from raycomp.pruning.search.space import Ratios, SearchSpace, config_list

Mode = Literal["max", "min"]


def judge_by(pruner: Pruner, space: SearchSpace, metric: Callable[[nn.Module], float]) -> Judge:
    """Judges candidates one after the other: sets their masks on the pruner's model, and takes its metric.

    Args:
        pruner: whose model.
        space: what the candidates are of.
        metric: of a model.
    """

    def judge(candidates: Sequence[Ratios]) -> list[float]:
        before, metrics = pruner.get_masks(), []
        for ratios in candidates:
            try:
                metrics.append(_metric(pruner, space.chosen(ratios), metric))
            finally:
                # What one candidate masks would stay so for the next.
                pruner.choose(space.selection)
                pruner.update_masks(before)
        return metrics

    return judge


def _metric(pruner: Pruner, selection: Selection, metric: Callable[[nn.Module], float]) -> float:
    pruner.choose(selection)
    pruner.set_masks(pruner.saliencies(), 1.0)
    pruner.follow()
    with evaluation_mode(pruner.model), torch.no_grad():
        return float(metric(pruner.model))


class SearchingPruner(AroundPruner):
    """Searches for the part that each layer loses, under one sparse ratio or budget for all of them, and prunes so.

    A candidate is judged by the metric of the model under its masks, without training; the basic pruner then prunes by
    the best one, and trains as it does alone. What was found is `found`, a config list.

    Args:
        pruner: the basic pruner that ranks and masks; it ranks weights as they are.
        evaluator: gives the metric (`evaluating_func`) and trains, where the pruner has no evaluator yet.
        mode: whether more or less of the metric is better.
        evaluations: candidates that are judged at most (None: all that the search asks for).
        seconds: no round is begun after this time (None: none). With it, the result depends on the machine.
        seed: of what is drawn.
    """

    @abstractmethod
    def __init__(
        self,
        pruner: Pruner,
        evaluator: Evaluator | None = None,
        *,
        mode: Mode = "max",
        evaluations: int | None = None,
        seconds: float | None = None,
        seed: int = 0,
    ) -> None:
        if pruner.window or pruner.schedule.last_step or not pruner.searchable:
            message = f"{type(pruner).__name__} ranks by what it sees in training, or over all layers"
            raise CompressionError(
                message, remedy="search with one that ranks weights as they are, such as L1NormPruner"
            )
        super().__init__(pruner, evaluator)
        self.mode: Mode = mode
        self.limits = Limits(evaluations, seconds)
        self.seed = seed
        self.result: Judged | None = None

    @abstractmethod
    def search(self, space: SearchSpace) -> Search:
        """The search over a space."""

    @property
    def found(self) -> list[dict[str, object]]:
        """What was found, as a config list; empty before the search."""
        return [] if self.result is None else config_list(self.pruner.selection)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Searches, prunes by what was found, and trains; see `Compressor.compress`.

        Raises:
            CompressionError: there is no evaluator with an evaluating_func.
        """
        if self.result is None:
            self.look(SearchSpace(self.pruner))
        return super().compress(max_steps, max_epochs)

    def look(self, space: SearchSpace) -> None:
        """Searches a space; the pruner prunes by what was found from now on."""
        evaluator = self.pruner.evaluator
        if evaluator is None:
            raise CompressionError("a search needs an evaluator", remedy="TorchEvaluator(…, evaluating_func=…)")
        judge = judge_by(self.pruner, space, evaluator.evaluate)
        # From now on: what was done, or trained, since this was made isn't the search's.
        self.limits = Limits(self.limits.evaluations, self.limits.seconds)
        self.result = searched(self.search(space), judge, goes_on=self.limits.go_on)
        self.pruner.choose(space.chosen(self.result.ratios))


class Limits:
    """How long a search may go on; its first round is always judged.

    Args:
        evaluations: candidates at most.
        seconds: from now.
    """

    def __init__(self, evaluations: int | None = None, seconds: float | None = None) -> None:
        self.evaluations, self.seconds = evaluations, seconds
        self._begun = time.monotonic()

    def go_on(self, search: Search) -> bool:
        """Whether another round may begin."""
        if self.evaluations is not None and len(search.judged) >= self.evaluations:
            return False
        return self.seconds is None or time.monotonic() - self._begun < self.seconds
