"""Lottery tickets: sparsities round by round, first weights, fresh optimizers, and rounds that are resumed."""

from __future__ import annotations

import copy
from itertools import pairwise
from math import floor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from raycomp.core.moments import RunContext
from raycomp.core.rounds import conduct
from raycomp.core.target import TargetId
from raycomp.evaluators import TorchEvaluator
from raycomp.pruning import L1NormPruner, LotteryTicketPruner, SlimPruner, TaylorPruner

GOAL, TIMES, STEPS = 0.9, 3, 4
WEIGHT = TargetId("0", "weight")
ENTRY = {"op_names": ["0"], "sparse_ratio": GOAL, "granularity": [1, 1], "target_names": ["weight"]}


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.Linear(11, 3))


class Told(Exception):
    """Ends a run as a kill does."""


class Rounds:
    """The user's training function, and what it finds at each round's beginning."""

    def __init__(self, pruner: Any, dies: int | None = None, **ticket: Any) -> None:
        self.model = pruner.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.evaluator = TorchEvaluator(
            self.train,
            self.optimizer,
            lambda batch, model: functional.cross_entropy(model(batch[0]), batch[1]),
            self.scheduler,
        )
        self.ticket = LotteryTicketPruner(pruner, TIMES, evaluator=self.evaluator, **ticket)
        self.chain = self.ticket.chain
        self.dies = dies
        self.begun: list[dict[str, Any]] = []
        self.sparsities: list[int] = []
        self.saved: dict[str, Any] = {}
        end_round = self.chain.end_round

        def noted() -> None:
            end_round()
            self.sparsities.append(int((self.mask == 0).sum()))
            if self.dies == self.chain.step:
                self.save()

        self.chain.end_round = noted

    @property
    def mask(self) -> torch.Tensor:
        return self.chain.masks()["0"]["weight"]

    def train(self, model: nn.Module, optimizer: Any, step: Any, scheduler: Any, steps: int, epochs: Any) -> None:
        self.begun.append(
            {
                "weights": self.chain.users_state(),
                "optimizer": copy.deepcopy(optimizer.state_dict()),
                "mask": self.mask,
                "rate": optimizer.param_groups[0]["lr"],
            }
        )
        model.train()
        for number in range(self.chain.steps_in_round, steps):
            generator = torch.Generator().manual_seed(number)
            batch = torch.randn(16, 7, generator=generator), torch.randint(0, 3, (16,), generator=generator)
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()
            scheduler.step()
            if self.chain.step == self.dies and self.chain.steps_in_round < steps:
                self.save()

    def save(self) -> None:
        self.saved = copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "chain": self.chain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            }
        )
        raise Told

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.chain.load_state_dict(saved["chain"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])

    def compress(self) -> dict[str, Any]:
        self.ticket.compress(max_steps=STEPS)
        return {"weights": self.chain.users_state(), "mask": self.mask, "step": self.chain.step}


def l1() -> L1NormPruner:
    return L1NormPruner(network(), [ENTRY])


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


def test_each_round_prunes_the_same_part_of_what_is_left() -> None:
    rounds = Rounds(l1())
    rounds.compress()
    expected = [floor(77 * (1 - (1 - GOAL) ** (t / TIMES)) + 1e-9) for t in (1, 2, 3)]
    assert expected == [41, 60, 69]
    # The last round trains the ticket that is left.
    assert rounds.sparsities == [*expected, expected[-1]]
    assert len(rounds.begun) == TIMES + 1
    assert rounds.chain.step == (TIMES + 1) * STEPS


def test_each_round_begins_with_the_first_weights_and_a_fresh_optimizer_and_schedule() -> None:
    rounds = Rounds(l1())
    start = copy.deepcopy(network().state_dict())
    end = rounds.compress()
    for begun in rounds.begun:
        assert same(begun["weights"], start)
        assert begun["optimizer"]["state"] == {}
        assert begun["rate"] == 0.01
    assert not torch.equal(end["weights"]["0.weight"], start["0.weight"])
    assert [int((begun["mask"] == 0).sum()) for begun in rounds.begun] == [0, 41, 60, 69]
    # What the network computes with at a round's beginning is the first weight where it is kept, and 0 elsewhere.
    rounds.chain.rewind()
    assert torch.equal(rounds.model[0].weight, start["0.weight"] * end["mask"])


def test_without_rewinding_each_round_goes_on_from_the_last_ones_weights() -> None:
    rounds = Rounds(l1(), reset_weight=False)
    ends: list[dict[str, torch.Tensor]] = []
    end_round = rounds.chain.end_round

    def noted() -> None:
        ends.append(rounds.chain.users_state())
        end_round()

    rounds.chain.end_round = noted
    rounds.compress()
    for end, begun in zip(ends, rounds.begun[1:]):
        assert same(begun["weights"], end)
        assert begun["optimizer"]["state"] == {}
    assert rounds.sparsities == [41, 60, 69, 69]


PRUNERS = {
    "L1": l1,
    "Taylor": lambda: TaylorPruner(network(), [ENTRY], training_steps=2),
    "Slim": lambda: SlimPruner(network(), [ENTRY], training_steps=2),
}


@pytest.mark.parametrize("reset_weight", [True, False])
@pytest.mark.parametrize("dies", [2, STEPS, STEPS + 1, 2 * STEPS, 3 * STEPS + 2])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_round_that_was_cut_off_in_its_midst_or_at_its_end_is_resumed_to_the_same_bits(
    pruner: str, dies: int, reset_weight: bool
) -> None:
    undisturbed = Rounds(PRUNERS[pruner](), reset_weight=reset_weight).compress()
    killed = Rounds(PRUNERS[pruner](), dies, reset_weight=reset_weight)
    with pytest.raises(Told):
        killed.compress()
    resumed = Rounds(PRUNERS[pruner](), reset_weight=reset_weight)
    resumed.load(killed.saved)
    conduct(resumed.chain, resumed.chain.rounds, STEPS)
    found = {"weights": resumed.chain.users_state(), "mask": resumed.mask, "step": resumed.chain.step}
    assert found["step"] == undisturbed["step"] == (TIMES + 1) * STEPS
    assert same(found["weights"], undisturbed["weights"])
    assert torch.equal(found["mask"], undisturbed["mask"])
    assert int((found["mask"] == 0).sum()) == 69


def test_masks_never_grow_back_over_the_rounds() -> None:
    rounds = Rounds(l1())
    rounds.compress()
    masks = [begun["mask"] for begun in rounds.begun]
    assert all(bool((after <= before).all()) for before, after in pairwise(masks))


@pytest.mark.parametrize("rewinds", [True, False])
def test_what_is_learned_beside_the_model_has_a_fresh_optimizer_and_rewinds_with_it(rewinds: bool) -> None:
    pruner = SlimPruner(network(), [ENTRY], training_steps=2)
    chain = LotteryTicketPruner(pruner, 1, rewinds).chain
    (factor,) = pruner.factors.values()
    optimizer = torch.optim.SGD(chain.model.parameters(), 0.1)
    with chain.run(RunContext([optimizer])):
        chain.training_step(lambda: chain.model(torch.ones(4, 7)).square().mean(), None).backward()
        optimizer.step()
        chain.end_round()
    learned = factor.factor.detach().clone()
    assert bool((learned != 1).any())
    assert chain.learned.state_dict()["optimizer"]["state"] != {}
    chain.rewind()
    assert torch.equal(factor.factor, torch.ones_like(learned) if rewinds else learned)
    assert chain.learned.state_dict()["optimizer"]["state"] == {}
    assert torch.equal(chain.space.parameter(WEIGHT), network()[0].weight) == rewinds
