"""AutoML for model compression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycomp.pruning.search.ddpg import DDPG, Settings, Transition
from raycomp.pruning.search.search import Search
from raycomp.pruning.search.space import Ratios, SearchSpace

_FEATURES = 10
_NOISE = 0.5
_NOISE_DECAY = 0.99
_REMEMBERED_EPISODES = 100


class AMC(Search):
    """A policy walks through the units and says how much each loses; it learns from the metric at the end (He et al.,
    AMC, arXiv:1802.03494).

    A unit's state is its place, its number of targets, steps and elements, the part of the goal that it could reach
    alone, how far the goal is reached and could be by those that follow, what the unit before lost, and its clamps. An
    action is at least what those that follow can't make good for; what an episode chose is moved to the goal.

    Args:
        space, mode, seed: as `Search`.
        total_episode: choices in all.
        warmup_episode: the first ones, drawn at random.
        candidates: episodes that are judged side by side, between two updates of the policy.
    """

    def __init__(
        self, space: SearchSpace, mode: str, seed: int, *, total_episode: int, warmup_episode: int, candidates: int
    ) -> None:
        super().__init__(space, mode, seed)
        self.total_episode, self.warmup_episode, self.candidates = total_episode, warmup_episode, candidates
        units = space.units
        self.policy = DDPG(_FEATURES, _REMEMBERED_EPISODES * len(units), self.generator, Settings())
        self._most = [unit.clamps()[1] for unit in units]
        self._alone = [self._progress_alone(index) for index in range(len(units))]
        self._largest = max(unit.step_elements * len(unit.values) for unit in units)
        self._walks: list[list[tuple[Tensor, float]]] = []

    @property
    def evaluations(self) -> int:
        return self.total_episode

    @property
    def is_over(self) -> bool:
        return len(self.judged) >= self.total_episode

    def ask(self) -> list[Ratios]:
        done = len(self.judged)
        if not done:
            # Where all lose alike: what the policy has to be better than, and a first episode to learn from.
            self._walks = [self._walk(self.space.uniform())]
        else:
            episodes = range(done, min(done + self.candidates, self.total_episode))
            self._walks = [self._walk(None, episode) for episode in episodes]
        return [self.space.fitted([action for _, action in walk]) for walk in self._walks]

    def learn(self, metrics: Sequence[float]) -> None:
        for walk, reward in zip(self._walks, metrics, strict=True):
            states = [state for state, _ in walk]
            steps = zip(walk, [*states[1:], None], strict=True)
            self.policy.observe([Transition(state, action, reward, after) for (state, action), after in steps])
        if len(self.judged) >= self.warmup_episode:
            self.policy.learn(len(self.space.units) * len(metrics))

    def _walk(self, given: Ratios | None, episode: int = 0) -> list[tuple[Tensor, float]]:
        """An episode: the state and the action at each unit."""
        walk: list[tuple[Tensor, float]] = []
        counts: list[int] = []
        for index, unit in enumerate(self.space.units):
            state = self._state(index, counts, walk[-1][1] if walk else 0.0)
            wanted = self._action(state, episode) if given is None else given[index]
            count = min(max(round(wanted * len(unit.values)), self._least(index, counts)), self._most[index])
            counts.append(count)
            walk.append((state, count / len(unit.values)))
        return walk

    def _action(self, state: Tensor, episode: int) -> float:
        if episode < self.warmup_episode:
            return float(torch.rand((), generator=self.generator))
        far = _NOISE * _NOISE_DECAY ** (episode - self.warmup_episode)
        mean = self.policy.act(state)
        while True:
            # A normal distribution between 0 and 1.
            drawn = mean + far * float(torch.randn((), generator=self.generator))
            if 0 <= drawn <= 1:
                return drawn

    def _least(self, index: int, counts: Sequence[int]) -> int:
        """The fewest steps of a unit with which the goal can still be met."""
        low, high = self.space.units[index].clamps()[0], self._most[index]
        rest = self._most[index + 1 :]
        while low < high:
            middle = (low + high) // 2
            reached = self.space.progress([*counts, middle, *rest]) >= 1
            low, high = (low, middle) if reached else (middle + 1, high)
        return low

    def _state(self, index: int, counts: Sequence[int], before: float) -> Tensor:
        unit, units = self.space.units[index], self.space.units
        rest = [0] * (len(units) - len(counts))
        least, most = unit.clamps()
        return torch.tensor(
            [
                index / len(units),
                1 / len(unit.keys),
                1 / len(unit.values),
                unit.step_elements * len(unit.values) / self._largest,
                self._alone[index],
                self.space.progress([*counts, *rest]),
                self.space.progress([*counts, *self._most[len(counts) :]]),
                before,
                least / len(unit.values),
                most / len(unit.values),
            ]
        )

    def _progress_alone(self, index: int) -> float:
        counts = [most if place == index else 0 for place, most in enumerate(self._most)]
        return self.space.progress(counts)
