"""Weights that a layer doesn't simply hold: computed ones are refused by name, recurrent layers' are compressed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import utils

from raycomp.errors import ConfigError
from raycomp.pruning import L1NormPruner
from raycomp.quantization import QATQuantizer


class Computed(nn.Linear):
    """Its weight is no parameter."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.upper = nn.Parameter(torch.randn(2, 4))
        del self._parameters["weight"]

    def __getattr__(self, name: str) -> Any:
        upper = self._parameters.get("upper") if name == "weight" else None
        return super().__getattr__(name) if upper is None else torch.cat([upper, -upper])


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: utils.weight_norm(nn.Conv2d(3, 8, 3)), "from bias, weight_g, weight_v"),
    "spectral norm": (lambda: utils.spectral_norm(nn.Linear(3, 8)), "from bias, weight_orig"),
    "weight norm as parametrization": (
        lambda: utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        "by the parametrization WeightNorm",
    ),
    "spectral norm as parametrization": (
        lambda: utils.parametrizations.spectral_norm(nn.Linear(3, 8)),
        "by the parametrization SpectralNorm",
    ),
    "an attribute": (Computed, "from bias, upper"),
}


@pytest.mark.parametrize(("make", "how"), COMPUTED.values(), ids=list(COMPUTED))
@pytest.mark.parametrize("compressor", [L1NormPruner, QATQuantizer])
def test_a_computed_weight_is_refused_by_name(make: Callable[[], nn.Module], how: str, compressor: Any) -> None:
    """The bias alone is never selected in its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(make())
    targets = {"target_names": ["weight", "bias"]} if isinstance(model[0], Computed) else {}
    entry = {"op_names": ["0"], **targets} | ({"sparse_ratio": 0.5} if compressor is L1NormPruner else {})
    with pytest.raises(ConfigError, match=rf"config_list\[0\]\.target_names: 0 \(.*\) computes its 'weight' .*{how}"):
        compressor(model, [entry])


def test_a_missing_bias_is_no_computed_one() -> None:
    assert list(L1NormPruner(nn.Sequential(nn.Linear(3, 4, bias=False)), [half("weight", "bias")]).masks) == [
        ("0", "weight")
    ]


def half(*targets: str) -> dict[str, Any]:
    return {"op_names": ["0"], "target_names": list(targets), "sparse_ratio": 0.5}


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_runs_under_its_masks(kind: Any) -> None:
    torch.manual_seed(0)
    model, values = nn.Sequential(kind(4, 6, num_layers=2, bidirectional=True)), torch.randn(5, 2, 4)
    dense, expected = model(values)[0], copy.deepcopy(model)
    pruner = L1NormPruner(model, [half("weight_ih_l0", "weight_hh_l1_reverse")])
    masks = pruner.compress()[1]["0"]
    with torch.no_grad():
        for name, mask in masks.items():
            expected[0].get_parameter(name).mul_(mask)
    under_masks = model(values)[0]
    assert torch.equal(under_masks, expected(values)[0]) and not torch.equal(under_masks, dense)
    under_masks.sum().backward()
    gradient = pruner.chain.space.parameter(next(iter(pruner.masks))).grad
    assert gradient is not None and not gradient[masks["weight_ih_l0"] == 0].any()
    assert torch.equal(copy.deepcopy(model)(values)[0], under_masks)
    pruner.unwrap_model()
    assert type(model[0]) is kind
    assert torch.equal(model(values)[0], under_masks)
    with torch.no_grad():
        model[0].weight_ih_l0.zero_()
    assert not torch.equal(model(values)[0], under_masks)


def test_a_recurrent_layer_runs_on_its_quantized_weights() -> None:
    torch.manual_seed(0)
    model, values = nn.Sequential(nn.GRU(4, 6)), torch.randn(5, 2, 4)
    dense = model(values)[0]
    entry = {"op_names": ["0"], "target_names": ["weight_ih_l0"], "quant_dtype": "int2"}
    quantizer = QATQuantizer(model, [entry])
    quantizer.chain.begin()
    assert len(model[0].weight_ih_l0.unique()) <= 3
    assert not torch.allclose(model(values)[0], dense, atol=1e-3)
