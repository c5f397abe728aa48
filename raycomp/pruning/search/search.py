"""The base of searches: candidates are asked for, judged side by side, and their metrics told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from raycomp.pruning.search.space import Ratios, SearchSpace


@dataclass(frozen=True)
class Judged:
    """A candidate and the metric of the model under its masks."""

    ratios: Ratios
    metric: float


class Search(ABC):
    """Proposes candidates in rounds, each of a number that doesn't depend on how many can be judged at once.

    Args:
        space: what can be chosen.
        mode: whether more ("max") or less ("min") of the metric is better.
        seed: of what is drawn.
    """

    def __init__(self, space: SearchSpace, mode: str, seed: int) -> None:
        self.space = space
        self.sign = 1.0 if mode == "max" else -1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.judged: list[Judged] = []

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nothing more is to be asked for."""

    @abstractmethod
    def ask(self) -> list[Ratios]:
        """The candidates of the next round."""

    @abstractmethod
    def learn(self, metrics: Sequence[float]) -> None:
        """Takes the metrics of the round into account, in the candidates' order; more is better."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How many candidates it asks for in all."""

    def tell(self, candidates: Sequence[Ratios], metrics: Sequence[float]) -> None:
        """The metrics of a round's candidates."""
        self.judged += [Judged(*each) for each in zip(candidates, metrics, strict=True)]
        self.learn([self.sign * metric for metric in metrics])

    @property
    def best(self) -> Judged:
        """The best candidate so far; of equal ones the first."""
        return max(self.judged, key=lambda each: self.sign * each.metric)


Judge = Callable[[Sequence[Ratios]], Sequence[float]]
"""Gives the metric of each candidate."""


def searched(
    search: Search,
    judge: Judge,
    *,
    known: Sequence[Sequence[float]] = (),
    goes_on: Callable[[Search], bool] = lambda search: True,
    told: Callable[[Search], None] = lambda search: None,
) -> Judged:
    """Runs a search to its end and gives the best candidate.

    Args:
        search: which.
        judge: judges the candidates of a round.
        known: the metrics of rounds that were judged before: these are asked for again, and not judged.
        goes_on: asked before every round but the first.
        told: hears of every round that was judged.
    """
    rounds = iter(known)
    while not search.is_over and (not search.judged or goes_on(search)):
        candidates = search.ask()
        metrics = next(rounds, None)
        search.tell(candidates, judge(candidates) if metrics is None else metrics)
        if metrics is None:
            told(search)
    return search.best
