"""Multiply-accumulates, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.macs import count_macs


def test_macs_of_one_sample() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).train()
    # 8·3·9 per pixel of 8×8; 8·9 per pixel of 6×6; 288·10
    expected = 216 * 64 + 72 * 36 + 2880
    assert count_macs(model, torch.randn(5, 3, 8, 8)) == expected
    assert model.training


class Called(nn.Module):
    """A function as a module, with the layers that it uses."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


_TOKENS, _HEADS = 7, 2
_ATTENTION = 2 * _TOKENS * _TOKENS * 8  # scores and values, over heads of 4
_PROJECTIONS = 4 * _TOKENS * 8 * 8


@pytest.mark.parametrize(
    "model, shape, expected",
    [
        # Four gates, each from the input and the last output.
        pytest.param(nn.LSTM(4, 5, batch_first=True), (7, 4), 7 * 4 * 5 * (4 + 5), id="lstm"),
        pytest.param(
            nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True),
            (7, 4),
            2 * 7 * 4 * 6 * (4 + 6) + 2 * 7 * 4 * 6 * (12 + 6),
            id="two layers, both directions",
        ),
        pytest.param(nn.GRU(4, 5, batch_first=True), (7, 4), 7 * 3 * 5 * (4 + 5), id="gru"),
        pytest.param(nn.RNN(4, 5, batch_first=True), (7, 4), 7 * 5 * (4 + 5), id="rnn"),
        pytest.param(nn.LSTMCell(4, 5), (4,), 4 * 5 * (4 + 5), id="cell"),
        pytest.param(
            Called(lambda x, m: m(x, x, x), nn.MultiheadAttention(8, _HEADS, batch_first=True)),
            (_TOKENS, 8),
            _ATTENTION + _PROJECTIONS,
            id="attention layer",
        ),
        pytest.param(
            nn.TransformerEncoderLayer(8, _HEADS, 16, batch_first=True),
            (_TOKENS, 8),
            _ATTENTION + _PROJECTIONS + 2 * _TOKENS * 8 * 16,
            id="encoder layer",
        ),
        pytest.param(
            Called(lambda x: functional.scaled_dot_product_attention(x, x, x)), (2, 7, 4), _ATTENTION, id="attention"
        ),
        pytest.param(Called(lambda x: torch.einsum("bij,bkj->bik", x, x)), (7, 4), 7 * 7 * 4, id="einsum"),
        pytest.param(Called(lambda x: x @ x.transpose(1, 2)), (7, 4), 7 * 7 * 4, id="matmul"),
        pytest.param(Called(lambda x: x[0] @ x[0, 0]), (7, 4), 7 * 4, id="matrix and vector"),
        pytest.param(Called(lambda x: x[0] @ x[0]), (4,), 4, id="two vectors"),
        pytest.param(Called(lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0])), (7, 4), 7 * 4, id="addmv"),
        pytest.param(Called(lambda x: torch.addbmm(x[0], x, x)), (4, 4), 4 * 4 * 4, id="addbmm"),
        pytest.param(Called(lambda x, m: m(x, x), nn.Bilinear(3, 3, 5)), (3,), 5 * 3 * 3, id="bilinear"),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 25 * 4 * 3 * 9, id="transposed"),
        pytest.param(nn.Conv1d(3, 4, 3), (3, 9), 7 * 4 * 3 * 3, id="conv1d"),
    ],
)
def test_macs_within_layers(model: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert count_macs(model, torch.randn(2, *shape)) == expected


class Views(nn.Module):
    """Hands a parameter's part to a layer, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.fc = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc(self.positions.weight[:4].unsqueeze(0)).transpose(1, 2)


def test_macs_of_a_model_that_computes_with_parameters() -> None:
    assert count_macs(Views(), torch.randn(2, 3, 4)) == 4 * 4 * 4 + 3 * 4 * 4


def test_counting_leaves_the_kernels_as_they_were() -> None:
    count_macs(nn.Linear(2, 2), torch.randn(2, 2))
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled


def test_macs_are_counted_in_eval_mode_and_leave_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].eval()
    assert count_macs(model, {"input": torch.randn(3, 4)}) == 16
    assert [module.training for module in model.modules()] == [True, False, True]
    assert int(model[1].num_batches_tracked) == 0  # type: ignore[arg-type]


def test_macs_of_a_model_that_cannot_run() -> None:
    with pytest.raises(SpeedupError, match="Linear cannot run on one sample"):
        count_macs(nn.Linear(4, 4), torch.randn(2, 5))
