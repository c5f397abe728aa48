"""Where channels lie in an input or output whose dimensions are equally large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.errors import CompressionError, ConfigError
from raycomp.pruning import L1NormPruner


class Between(nn.Module):
    """A convolution, something, and an activation."""

    def __init__(self, layer: nn.Module, between: Any) -> None:
        super().__init__()
        self.layer, self.between, self.act = layer, between, nn.GELU()

    def forward(self, value: Tensor) -> Tensor:
        return self.act(self.between(self.layer(value)))


def mask_of(model: nn.Module, example: Tensor) -> Tensor:
    entries = [
        {"op_names": ["layer"], "sparse_ratio": 0.5},
        {"op_names": ["act"], "target_names": ["_output_"], "align": {"module_name": "layer"}},
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluator = TorchEvaluator(lambda *_: None, optimizer, lambda *_: None, dummy_input=example)
    return L1NormPruner(model, entries, evaluator).compress()[1]["act"]["_output_0"]


def test_a_transposed_sequence_is_masked_in_its_channels() -> None:
    model = Between(nn.Conv1d(4, 6, 1), lambda value: value.transpose(1, 2))
    assert mask_of(model, torch.randn(2, 4, 6)).shape == (1, 1, 6)


def test_a_permuted_image_is_masked_in_its_channels() -> None:
    model = Between(nn.Conv2d(3, 8, 1), lambda value: value.permute(0, 2, 3, 1))
    assert mask_of(model, torch.randn(2, 3, 8, 8)).shape == (1, 1, 1, 8)


def test_tokens_of_a_linear_layer_stay_tokens() -> None:
    model = Between(nn.Linear(4, 6), lambda value: value)
    assert mask_of(model, torch.randn(2, 6, 4)).shape == (1, 1, 6)


def test_a_channel_that_an_activation_clips_is_found_all_the_same() -> None:
    model = Between(nn.Conv1d(4, 6, 1), lambda value: torch.relu(value - 5).transpose(1, 2))
    assert mask_of(model, torch.randn(2, 4, 6)).shape == (1, 1, 6)


def test_what_mixes_channels_is_refused() -> None:
    mixing = torch.randn(6, 6)
    model = Between(nn.Linear(4, 6), lambda value: (value @ mixing).transpose(1, 2))
    with pytest.raises(ConfigError, match="isn't clear"):
        mask_of(model, torch.randn(2, 6, 4))


def test_an_example_without_a_batch_is_refused() -> None:
    model = Between(nn.Conv2d(3, 8, 1), lambda value: value)
    entries = [{"op_names": ["layer"], "target_names": ["_output_"], "align": {"module_name": "layer"}}]
    evaluator = TorchEvaluator(
        lambda *_: None,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda *_: None,
        dummy_input=torch.randn(3, 8, 8),
    )
    with pytest.raises(CompressionError, match="without a batch dimension"):
        L1NormPruner(model, entries, evaluator)
