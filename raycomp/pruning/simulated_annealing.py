"""Simulated annealing of sparsities."""

from __future__ import annotations

from raycomp.core.evaluator import Evaluator
from raycomp.pruning.bases.searching import Mode, SearchingPruner
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.search.annealing import Annealing
from raycomp.pruning.search.search import Search
from raycomp.pruning.search.space import SearchSpace


class SimulatedAnnealingPruner(SearchingPruner):
    """Anneals the parts that layers lose, under one goal for all (Liu et al., AutoCompress, arXiv:1907.03141).

    Args:
        pruner, evaluator, mode, evaluations, seconds, seed: see `SearchingPruner`.
        start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude: see `Annealing`.
        candidates: choices at each temperature, judged side by side in a job.
    """

    def __init__(
        self,
        pruner: Pruner,
        evaluator: Evaluator | None = None,
        *,
        start_temperature: float = 100.0,
        stop_temperature: float = 20.0,
        cool_down_rate: float = 0.9,
        perturbation_magnitude: float = 0.35,
        candidates: int = 4,
        mode: Mode = "max",
        evaluations: int | None = None,
        seconds: float | None = None,
        seed: int = 0,
    ) -> None:
        self.start_temperature, self.stop_temperature = start_temperature, stop_temperature
        self.cool_down_rate, self.perturbation_magnitude = cool_down_rate, perturbation_magnitude
        self.candidates = candidates
        super().__init__(pruner, evaluator, mode=mode, evaluations=evaluations, seconds=seconds, seed=seed)

    def search(self, space: SearchSpace) -> Search:
        return Annealing(
            space,
            self.mode,
            self.seed,
            start_temperature=self.start_temperature,
            stop_temperature=self.stop_temperature,
            cool_down_rate=self.cool_down_rate,
            perturbation_magnitude=self.perturbation_magnitude,
            candidates=self.candidates,
        )
