"""Budgets: what the model has behind speedup is what was predicted, and within the budget."""

from __future__ import annotations

import warnings
from math import isclose
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.core.coupling import Coupling
from raycomp.core.layout import layout_of
from raycomp.core.target import TargetId
from raycomp.errors import ConfigError
from raycomp.pruning import (
    AGPPruner,
    FPGMPruner,
    GroupNormPruner,
    GroupTaylorPruner,
    L1NormPruner,
    LevelPruner,
    LotteryTicketPruner,
    RandomPruner,
    SlimPruner,
)
from raycomp.pruning.budget import counts_within
from raycomp.speedup import ModelSpeedup, UnprunedWarning
from raycomp.speedup.graph.macs import count_macs
from tests.pruning.coupled_networks import NETWORKS, network


def evaluator_of(model: nn.Module, example: Tensor) -> TorchEvaluator:
    """Trains on random inputs for the mean square of the output."""

    def train(model: Any, optimizer: Any, step: Any, schedulers: Any, max_steps: int, max_epochs: Any) -> None:
        for number in range(max_steps):
            optimizer.zero_grad()
            step(
                torch.randn(example.shape, generator=torch.Generator().manual_seed(number)).to(example), model
            ).backward()
            optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return TorchEvaluator(train, optimizer, lambda batch, model: model(batch).square().mean(), dummy_input=example)


def measured(model: nn.Module, example: Tensor) -> dict[str, int]:
    """What a model really costs."""
    return {"macs": count_macs(model, example), "parameters": sum(each.numel() for each in model.parameters())}


def after_speedup(pruner: Any, example: Tensor) -> dict[str, float]:
    """Compresses, and gives the parts that are left; speedup says of nothing that it had to stay."""
    model = pruner.model
    before = measured(model, example)
    _, masks = pruner.compress()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnprunedWarning)
        pruner.unwrap_model()
        after = measured(ModelSpeedup(model.eval(), example, masks).speedup_model(), example)
    return {name: after[name] / before[name] for name in before}


def predicted(pruner: Any) -> dict[str, float]:
    """What the pruner's masks cost as the graph tells."""
    return pruner.costs.of({key: channel_mask(pruner, key) for key in pruner.costs.channels})


def channel_mask(pruner: Any, key: TargetId) -> Tensor:
    return pruner.layouts[key].channels(pruner.masks[key].mask).any(dim=1)


def channels_of(name: str, **keys: Any) -> list[dict[str, Any]]:
    return [{"op_names": list(NETWORKS[name].layers), **keys}]


BUDGETS = [{"macs": 0.5}, {"parameters": 0.6}, {"macs": 0.55, "parameters": 0.5}]


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_budget_is_kept_and_no_step_more_is_taken(name: str, budget: dict[str, float], ranked: bool) -> None:
    model, example = network(name)
    keys = {"budget": budget, **({"global_group_id": "g"} if ranked else {})}
    pruner = L1NormPruner(model, channels_of(name, **keys), evaluator_of(model, example))
    left = after_speedup(pruner, example)
    assert all(left[kind] <= limit for kind, limit in budget.items())
    assert left == pytest.approx(predicted(pruner), rel=1e-12)
    # Any one channel more, with all that goes with it, would break it.
    stays = {key: channel_mask(pruner, key) for key in pruner.costs.channels}
    assert {key.module for key in stays} >= set(NETWORKS[name].layers)
    for more in one_step_more(pruner, stays):
        found = pruner.costs.of(more)
        assert any(found[kind] > limit for kind, limit in budget.items())


def one_step_more(pruner: Any, stays: dict[Any, Tensor]) -> list[dict[Any, Tensor]]:
    """The masks with another channel of each unit: of one in each internal block, in all targets of its group."""
    groups: dict[Any, list[TargetId]] = {}
    for key in stays:
        settings = pruner.selected[key].settings
        groups.setdefault(settings.dependency_group_id or key, []).append(key)
    found = []
    for keys in groups.values():
        blocks = max(pruner.selected[key].settings.internal_metric_block or 1 for key in keys)
        rows = stays[keys[0]].view(blocks, -1).clone()
        if not rows.all():
            rows[torch.arange(blocks), rows.int().argmin(dim=1)] = True
            found.append({**stays, **dict.fromkeys(keys, rows.flatten())})
    return found


@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_an_absolute_budget_means_the_number(kind: str) -> None:
    model, example = network("residual")
    limit = int(measured(model, example)[kind] * 0.4)
    pruner = L1NormPruner(model, channels_of("residual", budget={kind: limit}), evaluator_of(model, example))
    left = after_speedup(pruner, example)[kind] * measured(network("residual")[0], example)[kind]
    assert limit * 0.9 < left <= limit


class Wide(nn.Module):
    """Wide enough for a channel to be less than a hundredth of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.b, self.nb = nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.c, self.nc = nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.fc = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.na(self.a(x)))
        x = torch.relu(x + self.nc(self.c(torch.relu(self.nb(self.b(x))))))
        return self.fc(x.mean((2, 3)))


KINDS: dict[str, Any] = {
    "FPGM": lambda *args: FPGMPruner(*args),
    "random": lambda *args: RandomPruner(*args),
    "group norm": lambda *args: GroupNormPruner(*args),
    "group Taylor": lambda *args: GroupTaylorPruner(*args, training_steps=2),
    "AGP": lambda *args: AGPPruner(GroupTaylorPruner(*args, training_steps=2), 2, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.25, 0.5])
def test_every_pruner_is_within_two_percent(kind: str, part: float) -> None:
    torch.manual_seed(0)
    model, example = Wide(), torch.randn(2, 3, 4, 4)
    entries = [{"op_types": ["Conv2d"], "budget": {"macs": part}, "global_group_id": "g"}]
    made = KINDS[kind](model, entries, evaluator_of(model, example))
    left = after_speedup(made, example)["macs"]
    assert part - 0.02 <= left <= part


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("name", ["residual", "unnormed", "depthwise", "grouped"])
def test_slimmed_norms_keep_a_budget(name: str, ranked: bool) -> None:
    """Norms of one sum share a mask, those behind groups lose as many in each, and a channel that one branch brings
    without a norm counts as one that stays."""
    model, example = network(name)
    keys = {"budget": {"macs": 0.5}, **({"global_group_id": "g"} if ranked else {})}
    entries = [{"op_types": ["BatchNorm2d"], **keys}]
    pruner = SlimPruner(model, entries, evaluator_of(model, example), training_steps=3, regular_scale=0.1)
    left = after_speedup(pruner, example)
    assert left == pytest.approx(predicted(pruner), rel=1e-12)
    assert left["macs"] <= 0.5


def test_layers_and_their_norms_share_a_mask_where_both_have_a_budget() -> None:
    model, example = network("residual")
    entries = [{"op_types": ["Conv2d", "BatchNorm2d"], "budget": B, "global_group_id": "g"}]
    pruner = L1NormPruner(model, entries, evaluator_of(model, example))
    left = after_speedup(pruner, example)
    assert left == pytest.approx(predicted(pruner), rel=1e-12)
    assert 0.45 < left["macs"] <= 0.5


def test_what_a_ratio_prunes_beside_a_budget_counts() -> None:
    model, example = network("unnormed")
    entries = [{"op_names": ["a", "c"], "budget": B}, {"op_names": ["b"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, entries, evaluator_of(model, example))
    left = after_speedup(pruner, example)
    assert left == pytest.approx(predicted(pruner), rel=1e-12)
    gone = {name: int((channel_mask(pruner, TargetId(name, "weight")) == 0).sum()) for name in ("a", "b", "c")}
    # Of 87584 MACs, half of b's channels leave 50720, and each of the 8 shared channels has 6340 of these.
    assert gone == {"a": 2, "b": 4, "c": 2}
    assert left["macs"] * 87584 == pytest.approx(50720 - 2 * 6340)


def test_lottery_rounds_leave_the_same_part_each_time() -> None:
    torch.manual_seed(0)
    model, example = Wide(), torch.randn(2, 3, 4, 4)
    entries = [{"op_types": ["Conv2d"], "budget": {"macs": 0.25}}]
    pruner = L1NormPruner(model, entries, evaluator_of(model, example))
    found = []
    evaluator = pruner.evaluator
    assert isinstance(evaluator, TorchEvaluator)
    train = evaluator.training_func

    def noting(*args: Any) -> None:
        found.append(predicted(pruner)["macs"])
        train(*args)

    evaluator.training_func = noting
    LotteryTicketPruner(pruner, 2).compress(max_steps=1)
    assert found == pytest.approx([1.0, 0.5, 0.25], abs=0.02)


def test_a_budget_that_can_t_be_met_is_told() -> None:
    model, example = network("unnormed")
    entries = [{"op_names": ["b"], "budget": {"macs": 0.1}}]
    pruner = L1NormPruner(model, entries, evaluator_of(model, example))
    with pytest.warns(UserWarning, match=r"L1NormPruner: the budget \{'macs': 0.1\} can't be met: all that may go"):
        pruner.compress()
    assert int(pruner.get_masks()["b"]["weight"].any(dim=1).any(dim=(1, 2)).sum()) == 1


B = {"macs": 0.5}


@pytest.mark.parametrize(
    ("kind", "entries", "told"),
    [
        (LevelPruner, [{"op_names": ["b"], "budget": B}], r"granularity: b\.weight: a budget says how many output"),
        (L1NormPruner, [{"op_names": ["b"], "budget": B, "granularity": "in_channel"}], r"granularity: b\.weight"),
        (L1NormPruner, [{"op_names": ["b"], "budget": B, "granularity": [1]}], r"granularity: b\.weight"),
        (L1NormPruner, [{"op_names": ["b"], "budget": B, "apply_method": "bypass"}], "no budget can be met by it"),
        (RandomPruner, [{"op_names": ["b"], "budget": B, "target_names": ["_output_"]}], r"b\._output_0: a budget"),
        (L1NormPruner, [{"op_names": ["b"], "budget": B, "sparse_ratio": 0.5}], "exclude each other"),
        (L1NormPruner, [{"op_names": ["b"], "budget": {}}], "it says of nothing how much may stay"),
        (L1NormPruner, [{"op_names": ["b"], "budget": {"macs": 0}}], r"budget\.macs: got 0"),
        (L1NormPruner, [{"op_names": ["b"], "budget": {"flops": 0.5}}], r"unknown key 'flops'"),
    ],
)
def test_a_wrong_budget_is_one_clear_error(kind: Any, entries: list[dict[str, Any]], told: str) -> None:
    model, example = network("unnormed")
    with pytest.raises(ConfigError, match=told):
        kind(model, entries, evaluator_of(model, example))


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([{"op_names": ["a", "c"], "budget": B}, {"op_names": ["b"], "budget": {"macs": 0.6}}], "one and the same"),
        ([{"op_names": ["fc"], "budget": B}], "no channel of its targets can be removed"),
    ],
)
def test_budgets_that_fit_no_channels_are_told(entries: list[dict[str, Any]], told: str) -> None:
    model, example = network("unnormed")
    with pytest.raises(ConfigError, match=told):
        L1NormPruner(model, entries, evaluator_of(model, example)).compress()


def test_a_budget_needs_an_example() -> None:
    with pytest.raises(ConfigError, match="give the evaluator a dummy_input"):
        L1NormPruner(network("unnormed")[0], [{"op_types": ["Conv2d"], "budget": B}])


class Steps:
    """A unit of single steps."""

    def __init__(self, values: list[float], least: int = 0, most: int | None = None) -> None:
        self.values, self.bounds = torch.tensor(values), (least, len(values) if most is None else most)

    def clamps(self) -> tuple[int, int]:
        return self.bounds


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_the_first_of_the_order_without_what_need_not_go(seed: int) -> None:
    draw = numpy.random.default_rng(seed)
    units = [Steps(sorted(draw.random(draw.integers(1, 7)).tolist())) for _ in range(4)]
    weights, goal = draw.integers(1, 20, size=4), 25

    def fits(counts: Any) -> bool:
        return int((weights * numpy.array(counts)).sum()) >= goal

    found, met = counts_within(units, [unit.values for unit in units], fits)  # type: ignore[arg-type]
    order = sorted((float(value), place) for place, unit in enumerate(units) for value in unit.values)
    counts = [0] * 4
    for _, place in order:
        if fits(counts):
            break
        counts[place] += 1
    assert met == fits(counts)
    assert all(mine <= walked for mine, walked in zip(found, counts))
    if met:
        assert fits(found)
        for place, count in enumerate(found):
            assert not count or not fits([each - (index == place) for index, each in enumerate(found)])


# Costs against counting.


def removed(coupling: Coupling, model: nn.Module, stays: Tensor) -> dict[str, dict[str, Tensor]]:
    """Masks of everything that makes the channels that go."""
    made = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for part in coupling.parts:
        if part.rank == 1:
            made[part.parameter] *= torch.tensor([channel < 0 or bool(stays[channel]) for channel in part.channel_of])
    for layers in coupling.layers:
        for name in layers.modules:
            layout = layout_of(model, TargetId(name, "weight"))
            channels = torch.tensor(coupling.channels_of(f"{name}.weight", layout.channel_dim or 0) or [])
            if len(channels):
                # `channels` of a view writes to the mask itself.
                for channel, keep in enumerate(stays[channels].tolist()):
                    if not keep:
                        rows, group = divmod(channel, len(channels) // layout.groups)
                        mask = made[f"{name}.weight"].unflatten(0, (layout.groups, -1))[rows]
                        mask.select(layout.channel_dim or 0, group).zero_()
    masks: dict[str, dict[str, Tensor]] = {}
    for name, mask in made.items():
        module, _, target = name.rpartition(".")
        masks.setdefault(module, {})[target] = mask
    return masks


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_what_is_counted_after_a_real_speedup(name: str, seed: int) -> None:
    model, example = network(name, seed)
    entries = channels_of(name, budget=B)
    pruner = L1NormPruner(model, entries, evaluator_of(model, example))
    coupling = pruner.selection.coupling
    assert coupling is not None
    pruner.unwrap_model()
    generator, blocks = torch.Generator().manual_seed(seed), 2 if name in ("grouped", "transposed") else 1
    stays = torch.ones(len(coupling.cells), dtype=torch.bool)
    for layer in NETWORKS[name].layers:
        layout = layout_of(model, TargetId(layer, "weight"))
        channels = torch.tensor(coupling.channels_of(f"{layer}.weight", layout.channel_dim or 0)).view(blocks, -1)
        # Each group of a grouped layer loses as many; the first channel stays, whatever other layers of it say.
        count = int(torch.randint(channels.shape[1], (), generator=generator))
        for row in channels:
            stays[row[1:][torch.randperm(len(row) - 1, generator=generator)[:count]]] = False
    kept = coupling.kept(stays)
    small = ModelSpeedup(model, example, removed(coupling, model, stays)).speedup_model()
    found = measured(small, example)
    assert isclose(coupling.macs.of(kept), found["macs"], rel_tol=1e-12)
    assert isclose(coupling.parameters.of(kept), found["parameters"], rel_tol=1e-12)
    whole = coupling.kept(torch.ones_like(stays))
    assert {kind: round(cost.of(whole)) for kind, cost in coupling.costs.items()} == measured(model, example)


def test_group_norms_are_the_sums_of_all_that_goes_with_a_channel() -> None:
    model, example = network("unnormed")
    entries = [{"op_names": ["a", "b", "c"], "sparse_ratio": 0.25}]
    squares = {name: each.detach().numpy() ** 2 for name, each in model.named_parameters()}
    found = GroupNormPruner(model, entries, evaluator_of(model, example)).saliencies()
    a, b, c, head = (squares[f"{name}.weight"] for name in ("a", "b", "c", "fc"))
    sums = numpy.sum
    # The channels of a and c are added: both layers' rows, a's norm, the columns of b and of the head.
    shared = sums(a, (1, 2, 3)) + sums(c, (1, 2, 3)) + sums(b, (0, 2, 3)) + sums(head, 0)
    shared += sum(squares[name] for name in ("a.bias", "c.bias", "na.weight", "na.bias"))
    inner = sums(b, (1, 2, 3)) + squares["nb.weight"] + squares["nb.bias"] + sums(c, (0, 2, 3))
    for name, expected in (("a", shared), ("b", inner), ("c", shared)):
        saliency = found[TargetId(name, "weight")].flatten().numpy()
        numpy.testing.assert_allclose(saliency, numpy.sqrt(expected), rtol=1e-12)


def test_blocks_of_input_channels_are_not_judged_as_output_channels() -> None:
    # As many inputs as outputs: their number alone doesn't tell.
    model, example = network("unnormed")
    entries = [{"op_names": ["b"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    with pytest.raises(ConfigError, match=r"b\.weight is judged by whole output channels"):
        GroupNormPruner(model, entries, evaluator_of(model, example))


def test_a_batch_of_one_is_pruned_like_any_other() -> None:
    model, example = network("residual")
    pruner = L1NormPruner(model, channels_of("residual", budget=B), evaluator_of(model, example[:1]))
    assert after_speedup(pruner, example[:1])["macs"] <= 0.5
