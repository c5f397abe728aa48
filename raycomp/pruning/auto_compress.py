"""AutoCompress: searching and pruning in turns."""

from __future__ import annotations

from typing import Any

from torch import nn

from raycomp.core.evaluator import Evaluator
from raycomp.core.masks import Masks
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.search.space import SearchSpace
from raycomp.pruning.simulated_annealing import SimulatedAnnealingPruner


class AutoCompressPruner(SimulatedAnnealingPruner):
    """Anneals how much each layer loses, prunes so, and begins again: `total_iteration` times, each time the same part
    of what is left (Liu et al., AutoCompress, arXiv:1907.03141, where an `ADMMPruner` prunes).

    In a job each turn is a stage of its own, behind which what is masked is cut out. In a script the model keeps its
    size.

    Args:
        pruner: prunes in each turn.
        evaluator: see `SearchingPruner`.
        total_iteration: turns until the goal is reached.
        settings: the arguments of `SimulatedAnnealingPruner`, by name.
    """

    def __init__(
        self, pruner: Pruner, evaluator: Evaluator | None = None, *, total_iteration: int = 3, **settings: Any
    ) -> None:
        self.total_iteration = total_iteration
        super().__init__(pruner, evaluator, **settings)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """All turns; a length is that of each."""
        goal = self.pruner.selection
        for turn in range(self.total_iteration):
            self.pruner.choose(goal)
            self.look(SearchSpace(self.pruner, (turn + 1) / self.total_iteration))
            if turn:
                self.pruner.begin_again()
            result = super().compress(max_steps, max_epochs)
        return result
