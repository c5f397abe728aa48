"""The values that NNI 3.0 and 2.10 give on small weights, for the pruners that other tests of this folder leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp.pruning import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    SlimPruner,
)


def linear(weight: Tensor, bias: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def square() -> nn.Sequential:
    return linear(torch.arange(1.0, 17).view(4, 4))


def filters(weights: list[float]) -> nn.Sequential:
    """A convolution whose i-th filter is filled with the i-th weight."""
    model = nn.Sequential(nn.Conv2d(2, len(weights), 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weights).view(-1, 1, 1, 1).expand(-1, 2, 3, 3))
    return model


def masks(kind: Any, model: nn.Module, **keys: Any) -> dict[str, Tensor]:
    return kind(model, [{"op_names": ["0"], **keys}]).compress()[1]["0"]


def gone(mask: Tensor) -> list[int]:
    """The rows that are masked whole; no other entry is masked."""
    kept = mask.flatten(1)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    return (kept[:, 0] == 0).nonzero().flatten().tolist()


def test_level_prunes_the_upper_rows_and_their_bias() -> None:
    found = masks(LevelPruner, square(), sparse_ratio=0.5)
    assert gone(found["weight"]) == [0, 1]
    assert found["bias"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("keys", "count"), [({"sparse_threshold": 6}, 5), ({"sparse_threshold": 6, "max_sparse_ratio": 0.2}, 3)]
)
def test_level_by_a_threshold(keys: dict[str, Any], count: int) -> None:
    assert masks(LevelPruner, square(), **keys)["weight"].flatten().tolist() == [0] * count + [1] * (16 - count)


def test_level_by_input_channels_keeps_the_bias() -> None:
    found = masks(LevelPruner, square(), sparse_ratio=0.5, granularity="in_channel")
    assert found["weight"].tolist() == [[0, 0, 1, 1]] * 4
    assert found["bias"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("schedule", "sparsities"),
    [(AGPPruner, [0.375, 0.625, 0.6875, 0.75]), (LinearPruner, [0.1875, 0.375, 0.5625, 0.75])],
)
def test_level_under_a_schedule(schedule: Any, sparsities: list[float]) -> None:
    model = square()
    pruner = schedule(LevelPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.75}]), 1, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    seen = []
    with pruner.chain.run([optimizer]):
        for _ in range(4):
            optimizer.step()
            seen.append(1 - float(pruner.get_masks()["0"]["weight"].mean()))
    assert seen == sparsities


def balanced(model: nn.Module, gran: list[int], ratio: float = 0.5) -> Tensor:
    pruner = LevelPruner(model, [{"op_names": ["0"], "sparse_ratio": ratio}], mode="balance", balance_gran=gran)
    return pruner.compress()[1]["0"]["weight"]


def test_two_of_every_four_weights() -> None:
    weight = torch.tensor([[1.0, -4, 3, 2, 8, 7, 6, 5], [0, 0, 1, 1, 9, -9, 10, 0.5]])
    assert balanced(linear(weight), [4]).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 1, 0]]


def test_one_of_every_four_stays_at_three_quarters() -> None:
    assert balanced(square(), [4], 0.75).tolist() == [[0, 0, 0, 1]] * 4


@pytest.mark.parametrize(("gran", "counts"), [([4, 1, 1], (4, 1, 1)), ([2, 4, 1, 1], (2, 4, 1, 1)), ([3], (1, 1, 3))])
def test_balanced_blocks_lie_in_the_last_dimensions(gran: list[int], counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 3))
    weight = model[0].weight.detach().clone()
    mask = balanced(model, gran)
    sizes = (1,) * (4 - len(counts)) + counts
    for block, values in zip(blocks(mask, sizes), blocks(weight, sizes), strict=True):
        dead = block == 0
        assert int(dead.sum()) == block.numel() // 2
        assert values[dead].abs().max() < values[~dead].abs().min()


def blocks(value: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Walks over all blocks by slicing."""
    found = [value]
    for dim, size in enumerate(sizes):
        found = [part for each in found for part in each.split(size, dim)]
    return found


def test_fpgm_prunes_what_lies_between_the_others() -> None:
    weight = torch.tensor([[0.0, 0], [1, 0], [0, 1], [10, 10]])
    assert gone(masks(FPGMPruner, linear(weight), sparse_ratio=0.5)["weight"]) == [1, 2]


def test_fpgm_on_filters_of_equal_weights() -> None:
    model = filters([float(index + 1) for index in range(10)])
    assert gone(masks(FPGMPruner, model, sparse_ratio=0.2)["weight"]) == [4, 5]


@pytest.mark.parametrize("kind", [L1NormPruner, L2NormPruner])
def test_norms_on_filters_of_equal_weights(kind: Any) -> None:
    model = filters([float(index) for index in range(10)])
    assert gone(masks(kind, model, sparse_ratio=0.6)["weight"]) == [0, 1, 2, 3, 4, 5]


def test_l1_and_l2_differ_where_a_filter_is_uneven() -> None:
    # L1: 4 and 5; L2: 4 and 3: √(6.25 + 2.25 + 0.5).
    weight = torch.tensor([[4.0, 0, 0, 0], [2.5, 1.5, 0.5, 0.5]])
    assert gone(masks(L1NormPruner, linear(weight), sparse_ratio=0.5)["weight"]) == [0]
    assert gone(masks(L2NormPruner, linear(weight), sparse_ratio=0.5)["weight"]) == [1]


def test_a_global_group_of_row_norms() -> None:
    rows = torch.tensor([[2.0, 4, 6, 8], [80, 6, 4, 2]]) / 4
    model = nn.Sequential(*linear(rows[0].view(4, 1).expand(4, 4)), *linear(rows[1].view(4, 1).expand(4, 4)))
    entry = {"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": "g"}
    found = L1NormPruner(model, [entry]).compress()[1]
    assert [gone(found[name]["weight"]) for name in ("0", "1")] == [[0, 1], [2, 3]]


def trained(pruner: Any, batches: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """The masks after one step with each batch, in which no weight of the model's own changes."""
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.0)
    with pruner.chain.run([optimizer]):
        for batch in batches:
            pruner.chain.training_step(lambda batch=batch: pruner.model(batch).sum(), batch).backward()
            optimizer.step()
    return pruner.get_masks()


def test_slim_keeps_the_batch_norms_with_the_larger_factors() -> None:
    # w = [0..4]: the factor of a channel falls by its penalty, and by the part that its weight has in the loss.
    model = nn.Sequential(nn.BatchNorm1d(5))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(5.0))
    pruner = SlimPruner(model, [{"op_types": ["BatchNorm1d"], "sparse_ratio": 0.2}], training_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    images = torch.tensor([[-1.0], [1.0]]).expand(2, 5)
    with pruner.chain.run([optimizer]):
        # Their outputs are ±w, of which the loss wants the second larger.
        pruner.chain.training_step(lambda: -model(images)[1].sum() * 10, images).backward()
        optimizer.step()
    found = pruner.get_masks()["0"]
    assert found["weight"].tolist() == found["bias"].tolist() == [0, 1, 1, 1, 1]


ZEROS = [[0, 0, 1], [0, 0, 0]]
"""Where the outputs of three channels are zero, in each of two batches."""


def with_zeros(zeros: list[int]) -> Tensor:
    """Two samples whose channels are positive, or for one sample of them as often zero as asked for."""
    batch = torch.ones(2, 3)
    batch[0] -= 2 * torch.tensor(zeros)
    return batch


def test_apoz_over_two_batches() -> None:
    model = linear(torch.eye(3), bias=False)
    entries = [{"op_names": ["0"], "sparse_ratio": 0.4}]
    batches = [with_zeros(zeros) for zeros in ZEROS]
    undecided = ActivationAPoZRankPruner(linear(torch.eye(3), bias=False), entries, training_steps=3)
    trained(undecided, batches)
    assert [each.flatten().tolist() for each in undecided.saliencies().values()] == [[1, 1, 0.75]]
    pruner = ActivationAPoZRankPruner(model, entries, training_steps=2)
    assert gone(trained(pruner, batches)["0"]["weight"]) == [2]


def test_mean_activations_of_two_batches() -> None:
    model = linear(torch.diag(torch.tensor([1.0, -1, 3])), bias=False)
    pruner = ActivationMeanRankPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.4}], training_steps=2)
    batches = [torch.tensor([[1.0, 5, 1], [3, 5, -9]]), torch.tensor([[1.0, -2, 0], [1, 5, 0]])]
    # Behind ReLU: (1+3+1+1)/4 = 1.5, 2/4 = 0.5, 3/4.
    assert gone(trained(pruner, batches)["0"]["weight"]) == [1]
    model = linear(torch.diag(torch.tensor([1.0, -1, 3])), bias=False)
    entries = [{"op_names": ["0"], "sparse_ratio": 0.4}]
    # Without it: 1.5, −13/4, −24/4.
    pruner = ActivationMeanRankPruner(model, entries, training_steps=2, activation="none")
    assert gone(trained(pruner, batches)["0"]["weight"]) == [2]
