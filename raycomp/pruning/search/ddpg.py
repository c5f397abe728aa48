"""Deep deterministic policy gradients (Lillicrap et al., arXiv:1509.02971): a policy of one action in [0, 1]."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """How the policy learns; defaults are those of AMC (arXiv:1802.03494).

    Args:
        hidden: units of each of two layers.
        critic_rate, actor_rate: learning rates.
        discount: of what comes later.
        batch: transitions of one update.
        tau: how fast the target networks follow.
    """

    hidden: int = 300
    critic_rate: float = 1e-3
    actor_rate: float = 1e-4
    discount: float = 1.0
    batch: int = 64
    tau: float = 0.01


@dataclass(frozen=True)
class Transition:
    """A step of an episode; `following` is None for the last."""

    state: Tensor
    action: float
    reward: float
    following: Tensor | None


class DDPG:
    """An actor and a critic with their targets, and the transitions that they learn from.

    Args:
        features: of a state.
        memory: transitions that are kept.
        generator: draws weights and batches.
        settings: how they learn.
    """

    def __init__(self, features: int, memory: int, generator: torch.Generator, settings: Settings) -> None:
        self.settings = settings
        self.generator = generator
        self.actor = nn.Sequential(_network(features, settings.hidden, generator), nn.Sigmoid())
        self.critic = _network(features + 1, settings.hidden, generator)
        self.targets = copy.deepcopy((self.actor, self.critic))
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), settings.actor_rate)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), settings.critic_rate)
        self.memory: deque[Transition] = deque(maxlen=memory)
        self.baseline: float | None = None

    @torch.no_grad()
    def act(self, state: Tensor) -> float:
        """The policy's action."""
        return float(self.actor(state))

    def observe(self, transitions: Sequence[Transition]) -> None:
        """Keeps the transitions of an episode."""
        self.memory.extend(transitions)

    def learn(self, updates: int) -> None:
        """Updates both networks so many times, once there are enough transitions for a batch."""
        if len(self.memory) < self.settings.batch:
            return
        for _ in range(updates):
            places = torch.randint(len(self.memory), (self.settings.batch,), generator=self.generator).tolist()
            self._update([self.memory[place] for place in places])

    def _update(self, batch: Sequence[Transition]) -> None:
        states = torch.stack([each.state for each in batch])
        actions = torch.tensor([[each.action] for each in batch])
        rewards = torch.tensor([[each.reward] for each in batch])
        mean = float(rewards.mean())
        self.baseline = mean if self.baseline is None else 0.95 * self.baseline + 0.05 * mean
        wanted = rewards - self.baseline + self.settings.discount * self._later(batch)
        loss = nn.functional.mse_loss(self.critic(torch.cat([states, actions], dim=1)), wanted)
        _step(self.critic_optimizer, loss)
        _step(self.actor_optimizer, -self.critic(torch.cat([states, self.actor(states)], dim=1)).mean())
        with torch.no_grad():
            for network, target in zip((self.actor, self.critic), self.targets, strict=True):
                for own, slow in zip(network.parameters(), target.parameters(), strict=True):
                    slow.lerp_(own, self.settings.tau)

    @torch.no_grad()
    def _later(self, batch: Sequence[Transition]) -> Tensor:
        actor, critic = self.targets
        following = torch.stack([each.state if each.following is None else each.following for each in batch])
        goes_on = torch.tensor([[float(each.following is not None)] for each in batch])
        values: Tensor = critic(torch.cat([following, actor(following)], dim=1)) * goes_on
        return values


def _network(inputs: int, hidden: int, generator: torch.Generator) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
    for layer in layers:
        for parameter in layer.parameters():
            with torch.no_grad():
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) / sqrt(layer.in_features))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
