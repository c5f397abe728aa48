"""AutoML for model compression."""

from __future__ import annotations

from raycomp.core.evaluator import Evaluator
from raycomp.pruning.bases.searching import Mode, SearchingPruner
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.search.amc import AMC
from raycomp.pruning.search.search import Search
from raycomp.pruning.search.space import SearchSpace


class AMCPruner(SearchingPruner):
    """Lets a policy, which learns by deep deterministic policy gradients, say what each layer loses, under one goal for
    all (He et al., AMC, arXiv:1802.03494).

    Args:
        pruner, evaluator, mode, evaluations, seconds, seed: see `SearchingPruner`.
        total_episode: choices in all.
        warmup_episode: the first ones, drawn at random (None: a quarter of them, at most 100).
        candidates: episodes between two updates of the policy, judged side by side in a job.
    """

    def __init__(
        self,
        pruner: Pruner,
        evaluator: Evaluator | None = None,
        *,
        total_episode: int = 100,
        warmup_episode: int | None = None,
        candidates: int = 4,
        mode: Mode = "max",
        evaluations: int | None = None,
        seconds: float | None = None,
        seed: int = 0,
    ) -> None:
        self.total_episode, self.candidates = total_episode, candidates
        self.warmup_episode = min(total_episode // 4, 100) if warmup_episode is None else warmup_episode
        super().__init__(pruner, evaluator, mode=mode, evaluations=evaluations, seconds=seconds, seed=seed)

    def search(self, space: SearchSpace) -> Search:
        return AMC(
            space,
            self.mode,
            self.seed,
            total_episode=self.total_episode,
            warmup_episode=self.warmup_episode,
            candidates=self.candidates,
        )
