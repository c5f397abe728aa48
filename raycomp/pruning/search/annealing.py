"""Simulated annealing."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp, log

import torch

from raycomp.pruning.search.search import Search
from raycomp.pruning.search.space import Ratios, SearchSpace


class Annealing(Search):
    """Walks from choice to choice, ever less far and ever less ready to lose (Kirkpatrick et al., Science 1983; for
    pruning Liu et al., AutoCompress, arXiv:1907.03141).

    It begins with the same part of every unit. At each temperature it judges `candidates` choices near the present one,
    all parts of which are moved at random by up to `perturbation_magnitude` · T / T₀, and takes them one after the
    other: a better one always, a worse one with probability exp(−Δ / T), where Δ is the loss in percent of the first
    metric.

    Args:
        space, mode, seed: as `Search`.
        start_temperature, stop_temperature: T₀, and where it ends.
        cool_down_rate: what T is multiplied by.
        perturbation_magnitude: how far parts are moved at first.
        candidates: choices at each temperature.
    """

    def __init__(
        self,
        space: SearchSpace,
        mode: str,
        seed: int,
        *,
        start_temperature: float,
        stop_temperature: float,
        cool_down_rate: float,
        perturbation_magnitude: float,
        candidates: int,
    ) -> None:
        super().__init__(space, mode, seed)
        self.start_temperature, self.stop_temperature = start_temperature, stop_temperature
        self.cool_down_rate, self.perturbation_magnitude = cool_down_rate, perturbation_magnitude
        self.candidates = candidates
        self.round = 0
        self._present: Ratios = ()
        self._level = 0.0
        self._asked: list[Ratios] = []

    @property
    def temperature(self) -> float:
        """T."""
        return self.start_temperature * self.cool_down_rate ** max(self.round - 1, 0)

    @property
    def rounds(self) -> int:
        """Temperatures, and the choice to begin with."""
        return 1 + ceil(log(self.stop_temperature / self.start_temperature) / log(self.cool_down_rate))

    @property
    def evaluations(self) -> int:
        return 1 + (self.rounds - 1) * self.candidates

    @property
    def is_over(self) -> bool:
        return self.round >= self.rounds

    def ask(self) -> list[Ratios]:
        self._asked = [self.space.uniform()] if not self.round else [self._near() for _ in range(self.candidates)]
        return self._asked

    def learn(self, metrics: Sequence[float]) -> None:
        if not self.round:
            self._present, self._level = self._asked[0], metrics[0]
            self._unit = abs(metrics[0]) / 100 or 1.0
        else:
            for candidate, metric in zip(self._asked, metrics, strict=True):
                chance = float(torch.rand((), generator=self.generator))
                loss = (self._level - metric) / self._unit
                if loss <= 0 or chance < exp(-loss / self.temperature):
                    self._present, self._level = candidate, metric
        self.round += 1

    def _near(self) -> Ratios:
        far = self.perturbation_magnitude * self.temperature / self.start_temperature
        moves = (2 * torch.rand(len(self._present), generator=self.generator, dtype=torch.float64) - 1) * far
        wanted = (torch.tensor(self._present, dtype=torch.float64) + moves).clamp(0, 1)
        return self.space.fitted(wanted.tolist())
