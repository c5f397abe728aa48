"""Calls as NNI's scripts write them: taken, or one error that says what to write instead."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import raycomp
from raycomp.errors import SpeedupError
from raycomp.pruning import L1NormPruner
from raycomp.speedup import ModelSpeedup

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)]
    model = nn.Sequential(*layers).eval()
    nn.init.uniform_(model[1].bias, 0.5, 1)  # type: ignore[arg-type]
    return model


def masked(config_list: list[dict[str, object]]) -> tuple[nn.Sequential, dict[str, dict[str, torch.Tensor]]]:
    model = network()
    pruner = L1NormPruner(model, config_list)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    return model, masks


ENTRY: dict[str, object] = {"op_names": ["0"], "sparse_ratio": 0.5}


def test_nnis_spelling_and_integer_groups_are_taken() -> None:
    assert raycomp.auto_set_denpendency_group_ids is raycomp.auto_set_dependency_group_ids
    for key in ("dependency_group_id", "global_group_id"):
        masks = L1NormPruner(network(), [{**ENTRY, key: 1}]).compress()[1]
        assert int(masks["0"]["weight"].flatten(1).any(1).sum()) == 4


def test_a_result_that_is_dropped_is_warned_of() -> None:
    model, masks = masked([ENTRY])
    with pytest.warns(UserWarning, match="not changed in place: write model = ModelSpeedup"):
        ModelSpeedup(model, X, masks).speedup_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = ModelSpeedup(model, X, masks).speedup_model()
        assert ModelSpeedup(model, X, masks).speedup_model()(X).shape == small(X).shape


def test_what_blocks_a_channel_behind_a_norm_names_what_frees_it() -> None:
    model, masks = masked([ENTRY])
    speedup = ModelSpeedup(model, X, masks)
    assert speedup.speedup_model()[0].out_channels == 8  # type: ignore[index]
    assert all("align_followers" in item.reason for item in speedup.unpruned) and speedup.unpruned
    model, masks = masked(raycomp.align_followers(network(), [ENTRY], X))
    assert ModelSpeedup(model, X, masks).speedup_model()[0].out_channels == 4  # type: ignore[index]


def test_what_is_not_taken_says_what_to_write(tmp_path: Path) -> None:
    model, masks = masked([ENTRY])
    with pytest.raises(SpeedupError, match=r"torch\.load"):
        ModelSpeedup(model, X, str(tmp_path / "masks.pth"))  # type: ignore[arg-type]
    with pytest.raises(SpeedupError, match=r"takes no customized_replacers .*leave it out"):
        ModelSpeedup(model, X, masks, customized_replacers=[])
    with pytest.raises(TypeError, match=r"no argument 'exakt' .*'exact'"):
        ModelSpeedup(model, X, masks, exakt=False)
