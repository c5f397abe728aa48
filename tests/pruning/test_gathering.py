"""What pruners gather in each step: sums over channels, blocks and coupled weights, held against plain loops."""

from __future__ import annotations

import pytest
import torch

from raycomp.core.coupling import Cost, Coupling, Part
from raycomp.core.watching import watch
from raycomp.pruning.activation_apoz_rank import ActivationAPoZRankPruner
from raycomp.pruning.bases.watched import BlockMeans
from raycomp.pruning.movement import ScoredMask
from raycomp.pruning.saliency import expand_blocks


@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 4, 5, 2), 1), ((3, 5, 4), -1), ((6, 4), -1)])
def test_a_channel_s_mean_is_over_all_other_dimensions(shape: tuple[int, ...], channel_dim: int) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    means = BlockMeans("output", [1, 4], torch.relu, channel_dim)
    with watch("training"):
        means.gathers = True
        means(value)
        means(-value)
    expected = [torch.cat([each.relu().select(channel_dim, i).flatten() for each in (value, -value)]) for i in range(4)]
    torch.testing.assert_close(means.mean(), torch.stack([each.mean() for each in expected]).unsqueeze(0))


def test_what_is_judged_of_an_output_leaves_it_as_it_is() -> None:
    value = torch.tensor([0.0, -2.0, 3.0])
    assert ActivationAPoZRankPruner.judge(value).tolist() == [0.0, 1.0, 1.0]
    assert value.tolist() == [0.0, -2.0, 3.0]


def test_a_block_is_repeated_over_all_its_entries() -> None:
    grid = torch.arange(6.0).view(2, 3, 1)
    expanded = expand_blocks(grid, (2, 1, 4))
    assert expanded.shape == (4, 3, 4)
    assert all(expanded[i, j, k] == grid[i // 2, j, 0] for i in range(4) for j in range(3) for k in range(4))


def test_a_score_s_gradient_is_that_of_a_factor_of_its_whole_block() -> None:
    value = torch.tensor([[1.0, -2.0], [3.0, 4.0]], requires_grad=True)
    mask = ScoredMask((2, 2), "mul", [2, 1], [1, 2], torch.float32)
    mask.set_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    upstream = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    masked = mask(value)
    (masked * upstream).sum().backward()
    assert masked.tolist() == [[1.0, -2.0], [0.0, 0.0]]
    # A masked block's score learns, too: 2 * 3 - 1 * 4.
    assert mask.scores.grad is not None
    assert mask.scores.grad.tolist() == [[-1.5], [2.0]]
    assert value.grad is not None
    assert value.grad.tolist() == [[0.5, 1.0], [0.0, 0.0]]


def test_coupled_weights_add_up_where_their_channel_is() -> None:
    # Two channels: a layer's rows, its bias, and the columns of what takes them; one column goes with none.
    parts = (Part("a.weight", 0, (0, 1), 2), Part("a.bias", 0, (0, 1), 1), Part("b.weight", 1, (1, 0, -1), 2))
    coupling = Coupling((0, 0), parts, (), Cost(()), Cost(()))
    values = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 20.0]), torch.tensor([[100.0, 200.0, 5.0]])]
    along = [part.along(value) for part, value in zip(parts, values, strict=True)]
    assert coupling.summed(along, torch.float64).tolist() == [3.0 + 10 + 200, 7.0 + 20 + 100]


def test_a_grouped_weight_s_columns_are_other_channels_in_each_group() -> None:
    weight = torch.arange(8.0).view(4, 2, 1)
    assert Part("c.weight", 1, (0, 1, 2, 3), 3, groups=2).along(weight).tolist() == [0 + 2, 1 + 3, 4 + 6, 5 + 7]
