"""Saliencies against NumPy, block by block, over shapes and granularities; and what holds for any of their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import floor, prod
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from raycomp.core.layout import Layout
from raycomp.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LAMPPruner, LevelPruner, TaylorPruner
from raycomp.pruning.saliency import (
    block_sizes,
    block_vectors,
    distances,
    expand_blocks,
    from_block_vectors,
    l1_norm,
    l2_norm,
    layer_adaptive,
    taylor,
)

SHAPES = [(6,), (4, 6), (6, 4, 3), (8, 6, 3, 1), (4, 2, 3, 2, 2)]
GRANULARITIES: list[Any] = ["out_channel", "in_channel", (1,), (-1,), (2,), ((2, -1), "back", 1), ((-1,), "front", 2)]
CASES = [
    (shape, granularity)
    for shape, granularity in product(SHAPES, GRANULARITIES)
    if not (len(shape) == 1 and granularity == ((2, -1), "back", 1))
]


def sizes_of(shape: tuple[int, ...], granularity: Any) -> tuple[int, ...] | None:
    try:
        return block_sizes(granularity, Layout(shape, 0))
    except ValueError:
        return None


FITTING = [(shape, sizes) for shape, granularity in CASES if (sizes := sizes_of(shape, granularity)) is not None]


def test_most_cases_fit() -> None:
    assert len(FITTING) > 25


def blocks(value: numpy.ndarray, sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], numpy.ndarray]]:
    """Each block's place in the grid, and what is in it."""
    for place in product(*(range(dim // size) for dim, size in zip(value.shape, sizes))):
        yield place, value[tuple(slice(at * size, (at + 1) * size) for at, size in zip(place, sizes))]


def by_blocks(value: numpy.ndarray, sizes: tuple[int, ...], of: Callable[[numpy.ndarray], float]) -> numpy.ndarray:
    grid = numpy.zeros([dim // size for dim, size in zip(value.shape, sizes)])
    for place, block in blocks(value, sizes):
        grid[place] = of(block)
    return grid


def drawn(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, numpy.ndarray]:
    values = numpy.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(values), values


@pytest.mark.parametrize(("shape", "sizes"), FITTING)
def test_norms_and_taylor_of_each_block(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    weight, values = drawn(shape)
    gradient, slopes = drawn(shape, 1)
    close = {"rtol": 1e-12, "atol": 0}
    for found, expected in (
        (l1_norm(weight, sizes), by_blocks(values, sizes, lambda block: numpy.abs(block).sum())),
        (l2_norm(weight, sizes), by_blocks(values, sizes, lambda block: numpy.linalg.norm(block.ravel()))),
        (taylor(weight, gradient, sizes), by_blocks((values * slopes) ** 2, sizes, numpy.sum)),
    ):
        numpy.testing.assert_allclose(found.numpy(), expected, **close)


@pytest.mark.parametrize(("shape", "sizes"), FITTING)
def test_vectors_of_blocks_and_back(shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    weight, values = drawn(shape)
    vectors = block_vectors(weight, sizes)
    assert vectors.tolist() == [block.ravel().tolist() for _, block in blocks(values, sizes)]
    assert torch.equal(from_block_vectors(vectors, shape, sizes), weight)


@pytest.mark.parametrize(("shape", "sizes"), FITTING)
@pytest.mark.parametrize("at_once", [1, 7, 1 << 24])
def test_distances_of_blocks(shape: tuple[int, ...], sizes: tuple[int, ...], at_once: int) -> None:
    weight, values = drawn(shape)
    rows = [block.ravel() for _, block in blocks(values, sizes)]
    expected = [sum(float(numpy.linalg.norm(own - other)) for other in rows) for own in rows]
    numpy.testing.assert_allclose(distances(block_vectors(weight, sizes), at_once).numpy(), expected, rtol=1e-7)


def test_distances_of_equal_and_far_vectors_are_exact() -> None:
    assert distances(torch.ones(5, 3)).tolist() == [0] * 5
    # 1e6 from the origin, float32 holds their differences to a sixteenth.
    far = torch.tensor([[0.0, 0], [3, 4], [0, 4]]) + 1e6
    assert distances(far).tolist() == pytest.approx([5 + 4, 5 + 3, 4 + 3], rel=1e-12)


@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 2, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_lamp_by_a_loop(shape: tuple[int, ...], ties: bool) -> None:
    _, values = drawn(shape)
    squares = numpy.round(values**2) if ties else values**2
    flat = squares.ravel()
    # Of equal ones the first counts the others as no smaller, they don't count it.
    order = sorted(range(flat.size), key=lambda index: (flat[index], index))
    expected = numpy.zeros(flat.size)
    for place, index in enumerate(order):
        above = sum(flat[other] for other in order[place:])
        expected[index] = flat[index] / above if above else 0.0
    found = layer_adaptive(torch.from_numpy(squares))
    numpy.testing.assert_allclose(found.numpy(), expected.reshape(shape), rtol=1e-12)
    assert float(found.max()) == 1.0


def test_lamp_of_zeros_is_zero() -> None:
    assert layer_adaptive(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


# What holds for the masks of every pruner that ranks weights as they are.

PRUNERS = [LevelPruner, L1NormPruner, L2NormPruner, FPGMPruner, LAMPPruner]
RATIOS = [0.0, 0.1, 0.29, 0.5, 0.77, 0.95]
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "linear": (lambda: nn.Linear(12, 10), ["out_channel", "in_channel", [2, 4], [1], [2, -1]]),
    "conv": (lambda: nn.Conv2d(6, 8, 3), ["out_channel", "in_channel", [3, 3], [2, -1, -1, -1]]),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), ["out_channel", "in_channel"]),
    "transposed": (lambda: nn.ConvTranspose1d(6, 8, 3), ["out_channel", "in_channel"]),
    "grouped and transposed": (lambda: nn.ConvTranspose2d(6, 8, 2, groups=2), ["out_channel", "in_channel"]),
}
MODULES = [(name, granularity) for name, (_, granularities) in LAYERS.items() for granularity in granularities]


def pruned(kind: Any, module: nn.Module, **keys: Any) -> Tensor:
    entry = {"op_types": [type(module).__name__], "target_names": ["weight"], **keys}
    return kind(nn.Sequential(module), [entry]).compress()[1]["0"]["weight"]


def layer(name: str) -> nn.Module:
    torch.manual_seed(3)
    return LAYERS[name][0]()


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize(("name", "granularity"), MODULES)
def test_counts_are_exact_and_masks_nest(kind: Any, name: str, granularity: Any) -> None:
    module = layer(name)
    sizes = block_sizes(granularity, Layout(tuple(module.weight.shape), *channels_of(module)))
    count = prod(dim // size for dim, size in zip(module.weight.shape, sizes))
    before = torch.ones_like(module.weight)
    for ratio in RATIOS:
        mask = pruned(kind, layer(name), sparse_ratio=ratio, granularity=granularity)
        grid = mask[tuple(slice(None, None, size) for size in sizes)]
        assert torch.equal(expand_blocks(grid, sizes), mask)
        assert int((grid == 0).sum()) == floor(count * ratio + 1e-9)
        assert bool((mask <= before).all())
        before = mask


def channels_of(module: nn.Module) -> tuple[int, int]:
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
    return (1, module.groups) if transposed else (0, 1)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_permuted_filters_are_pruned_alike(kind: Any, ratio: float) -> None:
    module, order = layer("conv"), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    mask = pruned(kind, module, sparse_ratio=ratio, granularity="out_channel")
    turned = layer("conv")
    with torch.no_grad():
        turned.weight.copy_(turned.weight[order])
    again = pruned(kind, turned, sparse_ratio=ratio, granularity="out_channel")
    assert torch.equal(again, mask[order])


@pytest.mark.parametrize("kind", PRUNERS)
def test_of_equal_blocks_the_first_go(kind: Any) -> None:
    # Three pairs of equal filters: of the pair on the border the first goes.
    module = nn.Linear(4, 6)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([5.0, 1, 3, 3, 1, 5]).view(6, 1) * torch.tensor([1.0, -1, 2, 0.5]))
    mask = pruned(kind, module, sparse_ratio=0.5, granularity="out_channel")
    # To the geometric median the middle pair is nearest; the outer ones are as far.
    assert mask[:, 0].tolist() == ([0, 1, 0, 0, 1, 1] if kind is FPGMPruner else [1, 0, 0, 1, 0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_taylor_on_outputs_is_the_sum_over_samples(seed: int) -> None:
    """Σ over steps and samples of (a·g)² of each channel, where g is the gradient of the loss."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 1)).double()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    batches = [torch.randn(3, 2, 5, 5, dtype=torch.float64) for _ in range(2)]
    expected = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        hidden = torch.relu(nn.functional.conv2d(batch, weights[0], weights[1]))
        # The loss is the mean of the outputs: the gradient of an activation is its weight / 3.
        slopes = weights[2].view(1, 4, 3, 3) / 3
        expected += (hidden * slopes).square().sum(dim=(0, 2, 3))
    entries = [{"op_names": ["1"], "target_names": ["_output_"], "sparse_ratio": 0.5, "granularity": [-1, 1, -1, -1]}]
    evaluator = Loop(model, batches)
    pruner = TaylorPruner(model, entries, evaluator, training_steps=5)
    evaluator.run(pruner)
    (found,) = pruner.saliencies().values()
    numpy.testing.assert_allclose(found.flatten().numpy(), expected.numpy(), rtol=1e-12)


class Loop:
    """An evaluator that only gives an example; its loop trains nothing."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        self.batches, self.example = batches, batches[0]

    def run(self, pruner: Any) -> None:
        optimizer = torch.optim.SGD(pruner.model.parameters(), 0.0)
        with pruner.chain.run([optimizer]):
            for batch in self.batches:
                optimizer.zero_grad()
                pruner.chain.training_step(lambda batch=batch: pruner.model(batch).mean(), batch).backward()
                optimizer.step()

    def train(self, *args: Any) -> None: ...

    def calibrate(self, *args: Any) -> None: ...

    def evaluate(self, model: nn.Module) -> Any: ...

    def reset(self) -> None: ...
