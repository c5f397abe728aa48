"""Searches: the goal is met by every choice, the same seed gives the same result, and known optima are found."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.config import parse_job
from raycomp.config.turns import in_turns
from raycomp.errors import CompressionError, ConfigError
from raycomp.pruning import (
    ADMMPruner,
    AMCPruner,
    AutoCompressPruner,
    L1NormPruner,
    SimulatedAnnealingPruner,
    TaylorPruner,
)
from raycomp.pruning.bases.searching import judge_by
from raycomp.pruning.search.search import Judged, searched
from raycomp.pruning.search.space import Ratios, SearchSpace
from raycomp.speedup import ModelSpeedup
from raycomp.speedup.graph.macs import count_macs
from tests.contracts.tiny import job

WIDTHS = (20, 16, 24)
LAYERS = ["0", "2", "4"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (4, *WIDTHS)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 3))


def metric(model: nn.Module) -> float:
    """The first layer counts most: how many of its rows live, and a little of the others'."""
    rows = [int(model.get_submodule(name).weight.any(dim=1).sum()) for name in LAYERS]
    return 100 * rows[0] / 20 + 10 * rows[1] / 16 + rows[2] / 24


def evaluator_of(model: nn.Module, judge: Any = metric) -> TorchEvaluator:
    def train(model: Any, optimizer: Any, step: Any, schedulers: Any, max_steps: Any, max_epochs: Any) -> None:
        for number in range(max_steps or 3 * max_epochs):
            optimizer.zero_grad()
            step(torch.randn(8, 4, generator=torch.Generator().manual_seed(number)), model).backward()
            optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    example = torch.ones(2, 4)
    return TorchEvaluator(
        train, optimizer, lambda batch, model: model(batch).square().mean(), None, example, evaluating_func=judge
    )


def basic(judge: Any = metric, **keys: Any) -> L1NormPruner:
    model = network()
    return L1NormPruner(model, [{"op_names": LAYERS, **(keys or {"sparse_ratio": 0.5})}], evaluator_of(model, judge))


FEW = {"cool_down_rate": 0.8}
SEARCHES: dict[str, Any] = {
    "annealing": lambda pruner, **more: SimulatedAnnealingPruner(pruner, **{**FEW, **more}),
    "amc": lambda pruner, **more: AMCPruner(pruner, **{"total_episode": 30, "warmup_episode": 15, **more}),
}
GOALS: list[dict[str, Any]] = [{"sparse_ratio": 0.5}, {"budget": {"macs": 0.5}}, {"budget": {"parameters": 0.4}}]


class Seen:
    """Judges by what a search asks for, and keeps it."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.asked: list[list[Ratios]] = []

    def __call__(self, candidates: Sequence[Ratios]) -> list[float]:
        self.asked.append(list(candidates))
        return [-100 * each[0] - 10 * each[1] - each[2] for each in candidates]


def run(name: str, goal: dict[str, Any], seed: int = 0, known: Sequence[Sequence[float]] = ()) -> tuple[Seen, Judged]:
    pruner = SEARCHES[name](basic(**goal), seed=seed)
    space = SearchSpace(pruner.pruner)
    seen = Seen(space)
    return seen, searched(pruner.search(space), seen, known=known)


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_every_choice_meets_the_goal_with_no_step_more_than_needed(name: str, goal: dict[str, Any]) -> None:
    seen, _ = run(name, goal)
    space, total = seen.space, 0
    for candidates in seen.asked:
        for ratios in candidates:
            counts = space.counts(ratios)
            assert space.ratios(counts) == ratios
            assert space.progress(counts) >= 1 - 1e-9
            for place, count in enumerate(counts):
                fewer = [each - (index == place) for index, each in enumerate(counts)]
                assert not count or space.progress(fewer) < 1
            if "sparse_ratio" in goal:
                elements = [unit.step_elements for unit in space.units]
                gone = sum(size * count for size, count in zip(elements, counts))
                wanted = floor(0.5 * sum(size * len(unit.values) for size, unit in zip(elements, space.units)))
                assert wanted <= gone < wanted + max(elements)
            total += 1
    assert total > 20


@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_seed_gives_the_same_and_another_another(name: str) -> None:
    (first, best), (again, best_again), (other, _) = (run(name, GOALS[0], seed) for seed in (0, 0, 1))
    assert first.asked == again.asked and best == best_again
    assert first.asked != other.asked


@pytest.mark.parametrize("name", SEARCHES)
def test_known_rounds_are_not_judged_again_and_lead_to_the_same_end(name: str) -> None:
    whole, best = run(name, GOALS[0])
    metrics = [[-100 * each[0] - 10 * each[1] - each[2] for each in candidates] for candidates in whole.asked]
    half = len(metrics) // 2
    rest, best_again = run(name, GOALS[0], known=metrics[:half])
    assert rest.asked == whole.asked[half:]
    assert best_again == best


@pytest.mark.parametrize("goal", GOALS[:2], ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_found_is_better_than_uniform(name: str, goal: dict[str, Any]) -> None:
    """The optimum spares the first layer, which costs little and counts most."""
    seen, best = run(name, goal)
    uniform = seen.space.uniform()
    assert seen.asked[0] == [uniform]
    assert best.metric > -100 * uniform[0] - 10 * uniform[1] - uniform[2] + 15
    assert best.ratios[0] < uniform[0] - 0.15


@pytest.mark.parametrize("name", SEARCHES)
def test_less_may_be_better(name: str) -> None:
    made = SEARCHES[name](basic(), mode="min")
    space = SearchSpace(made.pruner)
    best = searched(made.search(space), lambda choices: [100 * each[0] for each in choices])
    assert best.ratios[0] < space.uniform()[0] - 0.15


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_script_prunes_by_the_best_choice(name: str, goal: dict[str, Any]) -> None:
    pruner = SEARCHES[name](basic(**goal))
    model = pruner.model
    before = count_macs(network(), torch.ones(2, 4)), sum(each.numel() for each in network().parameters())
    _, masks = pruner.compress()
    assert pruner.result is not None
    assert metric(model) == pruner.result.metric
    for name_of, part in zip(LAYERS, pruner.result.ratios):
        assert float((masks[name_of]["bias"] == 0).float().mean()) == pytest.approx(part)
    pruner.unwrap_model()
    small = ModelSpeedup(model, torch.ones(2, 4), masks).speedup_model()
    after = count_macs(small, torch.ones(2, 4)), sum(each.numel() for each in small.parameters())
    for kind, had, has in zip(("macs", "parameters"), before, after):
        limit = goal.get("budget", {}).get(kind)
        assert limit is None or limit - 0.05 < has / had <= limit


def test_what_was_found_prunes_alike_when_it_is_used_again() -> None:
    pruner = SEARCHES["annealing"](basic(budget={"macs": 0.5}))
    masks = pruner.compress()[1]
    model = network()
    again = L1NormPruner(model, pruner.found, evaluator_of(model)).compress()[1]
    for name in LAYERS:
        assert torch.equal(again[name]["weight"], masks[name]["weight"])


@pytest.mark.parametrize(
    ("limits", "judged"), [({"evaluations": 9}, 9), ({"evaluations": 1}, 1), ({"seconds": 1e-9}, 1)]
)
@pytest.mark.parametrize("name", SEARCHES)
def test_limits_end_a_search_between_two_rounds(name: str, limits: dict[str, Any], judged: int) -> None:
    # The uniform choice, then rounds of four.
    calls: list[float] = []

    def counted(model: nn.Module) -> float:
        calls.append(metric(model))
        return calls[-1]

    SEARCHES[name](basic(counted), **limits).compress()
    assert len(calls) == judged


def test_judging_leaves_the_pruner_as_it_was() -> None:
    pruner = basic()
    made = SEARCHES["annealing"](pruner)
    weights = [each.detach().clone() for each in pruner.model.parameters()]
    space = SearchSpace(pruner)
    seen: list[Tensor] = []

    def judge(model: nn.Module) -> float:
        assert not model.training
        seen.append(model.get_submodule("0").weight.detach().clone())
        return 0.0

    judge_by(pruner, space, judge)([space.uniform(), (0.0, 0.0, 0.0)])
    # The second choice is judged under its own masks alone.
    assert bool((seen[0] == 0).any()) and not bool((seen[1] == 0).any())
    assert all(torch.equal(each, before) for each, before in zip(pruner.model.parameters(), weights))
    assert all(bool(mask.all()) for targets in pruner.get_masks().values() for mask in targets.values())
    assert pruner.model.training and made.found == []


def test_what_ranks_by_training_is_refused() -> None:
    model = network()
    taylor = TaylorPruner(model, [{"op_names": LAYERS, "sparse_ratio": 0.5}], evaluator_of(model), 3)
    with pytest.raises(CompressionError, match="TaylorPruner ranks by what it sees in training"):
        SimulatedAnnealingPruner(taylor)


def test_goals_that_can_t_be_shared_out_are_refused() -> None:
    model = network()
    entries = [{"op_names": ["0"], "sparse_ratio": 0.5}, {"op_names": ["2"], "sparse_ratio": 0.4}]
    with pytest.raises(ConfigError, match="a search shares out one sparse_ratio, or one budget"):
        SimulatedAnnealingPruner(L1NormPruner(model, entries, evaluator_of(model))).compress()


@pytest.mark.parametrize("name", SEARCHES)
def test_every_layer_keeps_a_block_whatever_its_clamps_allow(name: str) -> None:
    pruner = SEARCHES[name](basic(sparse_ratio=0.95, max_sparse_ratio=1))
    assert all(bool(targets["weight"].any()) for targets in pruner.compress()[1].values())


# AutoCompress: turns.


def gone(masks: Any) -> float:
    weights = [masks[name]["weight"] for name in LAYERS]
    return 1 - sum(float(mask.sum()) for mask in weights) / sum(mask.numel() for mask in weights)


@pytest.mark.parametrize(("kind", "length"), [("l1", None), ("l1", 4), ("admm", 4)])
def test_each_turn_of_a_script_prunes_the_same_part_of_what_is_left(kind: str, length: int | None) -> None:
    turns, goal = 3, 0.8
    model = network()
    found: list[float] = []
    entries = [{"op_names": LAYERS, "sparse_ratio": goal}]
    granular = [{**entries[0], "granularity": "out_channel"}]
    pruner: Any = (
        L1NormPruner(model, entries, evaluator_of(model))
        if kind == "l1"
        else ADMMPruner(model, granular, evaluator_of(model), iterations=1)
    )
    made = AutoCompressPruner(pruner, total_iteration=turns, cool_down_rate=0.4, candidates=2)
    look = made.look

    def watched(space: SearchSpace) -> None:
        found.append(gone(pruner.get_masks()))
        look(space)

    made.look = watched  # type: ignore[method-assign]
    _, masks = made.compress(max_steps=length)
    found.append(gone(masks))
    step = max(20, 16, 24) / (4 * 20 + 20 * 16 + 16 * 24)
    assert found[0] == 0.0
    for turn in (1, 2, 3):
        wanted = 1 - (1 - goal) ** (turn / turns)
        assert wanted - 1e-3 <= found[turn] <= wanted + step


def test_the_seconds_of_a_search_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the training of earlier turns nor what a script does before it searches counts."""
    clock = [0.0]
    monkeypatch.setattr("raycomp.pruning.bases.searching.time.monotonic", lambda: clock[0])
    judged: list[float] = []

    def metric_of(model: nn.Module) -> float:
        judged.append(clock[0])
        return metric(model)

    pruner = basic(metric_of)
    evaluator = pruner.evaluator
    assert isinstance(evaluator, TorchEvaluator)
    train = evaluator.training_func

    def slow(*args: Any) -> None:
        clock[0] += 100.0
        train(*args)

    evaluator.training_func = slow
    made = AutoCompressPruner(pruner, total_iteration=2, seconds=50.0, cool_down_rate=0.4, candidates=2)
    clock[0] += 100.0
    made.compress(max_steps=2)
    # Each turn judges the uniform choice and two rounds of two.
    assert judged == [100.0] * 5 + [200.0] * 5


@pytest.mark.parametrize("cut", [True, False])
def test_a_jobs_turns_are_stages(cut: bool) -> None:
    auto = {
        "type": "AutoCompressPruner",
        "total_iteration": 2,
        "seed": 5,
        "pruner": {
            "type": "ADMMPruner",
            "iterations": 2,
            "config_list": [
                {"op_names": ["conv"], "sparse_ratio": 0.75, "target_settings": {"bias": {"sparse_ratio": 0.36}}},
                {"op_names": ["conv1"], "budget": {"macs": 0.25}},
            ],
        },
    }
    given = {**job(auto, {"type": "PtqQuantizer", "config_list": [{"op_types": ["Conv2d"]}]})}
    given["stages"][0]["speedup"] = cut
    config = parse_job(given)
    stages = in_turns(config).stages
    assert [stage.name for stage in stages] == ["fused-1", "fused-2"]
    assert [[each.type for each in stage.compressors] for stage in stages] == [
        ["SimulatedAnnealingPruner"],
        ["SimulatedAnnealingPruner", "PtqQuantizer"],
    ]
    turns: list[Any] = [stage.compressors[0] for stage in stages]
    assert [turn.seed for turn in turns] == [5, 6]
    # Of what is left each time, or of the whole where nothing is cut out.
    shares = [0.5, 0.5] if cut else [0.5, 1.0]
    for turn, share in zip(turns, shares):
        first, second = turn.pruner.config_list
        assert first.sparse_ratio == pytest.approx(1 - 0.25**share)
        assert first.settings_for("bias").sparse_ratio == pytest.approx(1 - 0.64**share)
        assert second.budget.macs == pytest.approx(0.25**share)
