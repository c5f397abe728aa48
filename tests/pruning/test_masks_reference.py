"""Masks against an independent reference: NumPy, which ranks by sorting everything."""

from __future__ import annotations

from math import floor, lcm
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from raycomp.config import PruneTarget
from raycomp.pruning.masks import MaskRequest, least, make_masks

CASES = 400


def part(total: int, ratio: float) -> int:
    return floor(total * ratio + 1e-9)


def reference(requests: list[MaskRequest]) -> dict[Any, numpy.ndarray]:
    """Sorts each unit's blocks by (value, index), and each global group by (value, order of the requests, rank)."""
    units: dict[Any, list[MaskRequest]] = {}
    for index, request in enumerate(requests):
        group = request.settings.dependency_group_id
        units.setdefault(index if group is None else group, []).append(request)
    ranked = []
    for members in units.values():
        blocks = lcm(*(member.settings.internal_metric_block or 1 for member in members))
        values = numpy.mean([pinned(member) for member in members], axis=0).reshape(blocks, -1)
        order = numpy.stack([numpy.lexsort((numpy.arange(len(row)), row)) for row in values])
        steps = numpy.take_along_axis(values, order, 1).mean(0)
        ranked.append((members, order, steps, blocks * sum(member.elements for member in members)))
    counts = [count_alone(members, steps) for members, _, steps, _ in ranked]
    constant = [is_constant(members, steps, count) for (members, _, steps, _), count in zip(ranked, counts)]
    counts = [gone(item[2]) if flat else count for item, flat, count in zip(ranked, constant, counts)]
    for group in {members[0].settings.global_group_id for members, *_ in ranked} - {None}:
        where = [
            index
            for index, item in enumerate(ranked)
            if item[0][0].settings.global_group_id == group and not constant[index]
        ]
        if not where:
            continue
        for index, count in zip(where, counts_together([ranked[index] for index in where])):
            counts[index] = count
    found = {}
    for (members, order, _, _), count in zip(ranked, counts):
        keep = numpy.ones(order.shape, bool)
        numpy.put_along_axis(keep, order[:, :count], False, 1)
        found |= {member.key: keep.reshape(member.saliency.shape) for member in members}
    return found


def pinned(member: MaskRequest) -> numpy.ndarray:
    values = member.saliency.double().numpy().flatten().copy()
    if member.pruned is not None:
        values[member.pruned.numpy().flatten()] = -numpy.inf
    return values


def gone(steps: numpy.ndarray) -> int:
    return int((steps == -numpy.inf).sum())


def is_constant(members: list[MaskRequest], steps: numpy.ndarray, count: int) -> bool:
    """Whether a ratio would choose among several blocks that are all alike."""
    settings, alive = members[0].settings, steps[steps > -numpy.inf]
    chooses = settings.global_group_id is not None or count > gone(steps)
    return settings.sparse_threshold is None and chooses and len(alive) > 1 and len(set(alive.tolist())) == 1


def clamps(members: list[MaskRequest], steps: numpy.ndarray) -> tuple[int, int]:
    least_ratio = max(member.settings.min_sparse_ratio or 0.0 for member in members)
    most = [member.settings.max_sparse_ratio for member in members if member.settings.max_sparse_ratio is not None]
    fraction = members[0].fraction
    upper = min(part(len(steps), min(most, default=1.0)), len(steps) - (1.0 not in most))
    return max(part(len(steps), least_ratio * fraction), gone(steps)), max(upper, gone(steps))


def count_alone(members: list[MaskRequest], steps: numpy.ndarray) -> int:
    settings, fraction = members[0].settings, members[0].fraction
    if settings.sparse_threshold is not None:
        count = int((steps < settings.sparse_threshold * fraction).sum())
    else:
        count = part(len(steps), (settings.sparse_ratio or 0.0) * fraction)
    lower, upper = clamps(members, steps)
    return min(max(count, lower), upper)


def counts_together(ranked: list[Any]) -> list[int]:
    """Walks through all steps of the group in their order while the budget lasts."""
    total = sum(len(steps) * size for _, _, steps, size in ranked)
    first = ranked[0][0][0]
    budget = part(total, (first.settings.sparse_ratio or 0.0) * first.fraction)
    bounds = [clamps(members, steps) for members, _, steps, _ in ranked]
    counts = [lower for lower, _ in bounds]
    spent = sum(lower * item[3] for (lower, _), item in zip(bounds, ranked))
    walk = sorted((value, unit, rank) for unit, item in enumerate(ranked) for rank, value in enumerate(item[2]))
    for _, unit, rank in walk:
        lower, upper = bounds[unit]
        if lower <= rank < upper:
            spent += ranked[unit][3]
            counts[unit] += spent <= budget
    return counts


def random_requests(generator: numpy.random.Generator) -> list[MaskRequest]:
    mode = generator.choice(["alone", "dependency", "global", "both"])
    count = int(generator.integers(1, 5))
    shape = tuple(int(size) for size in generator.choice([1, 2, 3, 4, 6, 12], size=generator.integers(1, 4)))
    blocks = int(generator.choice([block for block in (1, 2, 3, 4) if numpy.prod(shape) % block == 0]))
    ratio, threshold = (
        float(generator.choice([0.0, 0.1, 0.25, 0.29, 0.5, 0.77, 0.99])),
        float(generator.choice([0.3, 0.7, 1.0, 2.0])),
    )
    fraction = float(generator.choice([1.0, 0.3, 0.875]))
    by_threshold = mode in ("alone", "dependency") and generator.random() < 0.4
    requests = []
    for index in range(count):
        keys: dict[str, Any] = {"sparse_threshold": threshold} if by_threshold else {"sparse_ratio": ratio}
        if generator.random() < 0.3:
            keys["min_sparse_ratio"] = float(generator.choice([0.1, 0.3]))
        if generator.random() < 0.3:
            keys["max_sparse_ratio"] = float(generator.choice([0.5, 0.8, 1.0]))
        if mode in ("dependency", "both") and index < max(count - 1, 1):
            keys["dependency_group_id"] = "d"
            if blocks > 1:
                keys["internal_metric_block"] = blocks
        if mode in ("global", "both"):
            keys["global_group_id"] = "g"
        own = shape if "dependency_group_id" in keys else tuple(int(size) for size in generator.integers(1, 6, size=2))
        # Few values make many ties; 0.3 and 0.7 are no binary fractions.
        values = (
            generator.choice([0.0, 0.3, 0.7, 1.0, 1.5, 2.0], size=own)
            if generator.random() < 0.7
            else generator.random(own)
        )
        pruned = torch.from_numpy(generator.random(own) < 0.3) if generator.random() < 0.4 else None
        dtype = torch.float64 if generator.random() < 0.3 else torch.float32
        elements = 4 if "dependency_group_id" in keys else int(generator.integers(1, 5))
        requests.append(
            MaskRequest(index, torch.from_numpy(values).to(dtype), elements, PruneTarget(**keys), fraction, pruned)
        )
    return requests


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_those_of_sorting_everything(seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    some = 0
    for _ in range(CASES // 8):
        requests = random_requests(generator)
        expected = reference(requests)
        found = make_masks(requests).masks
        assert list(found) == list(expected)
        for key, mask in found.items():
            assert mask.numpy().tolist() == expected[key].tolist(), requests
            some += not mask.all()
    assert some > CASES // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_least_of_many_with_ties_are_found_without_sorting(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randint(0, 1000, (1_000_000,), generator=torch.Generator().manual_seed(0)).to(dtype)
    values[::7] = -torch.inf
    counts = (0, 1, 142_858, 500_000, 999_999, 1_000_000)
    order = values.double().argsort(stable=True)
    for name in ("sort", "argsort"):
        monkeypatch.setattr(Tensor, name, forbidden)
    for count in counts:
        chosen = least(values, count)
        assert int(chosen.sum()) == count
        assert bool(chosen[order[:count]].all())


def test_one_large_target_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    saliency = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1))
    for name in ("sort", "argsort"):
        monkeypatch.setattr(Tensor, name, forbidden)
    for settings in (
        {"sparse_ratio": 0.3},
        {"sparse_threshold": 0.3},
        {"sparse_ratio": 0.3, "dependency_group_id": "d"},
    ):
        (mask,) = make_masks([MaskRequest("a", saliency, 1, PruneTarget(**settings))]).masks.values()
        assert float(saliency[~mask].max()) < float(saliency[mask].min())
        assert 0 < int((~mask).sum()) < len(saliency)


def forbidden(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("sorted")
