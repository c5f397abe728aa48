"""Bases are no algorithms: constructing one is an error that says so, before the model is touched."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from raycomp.core.attach import is_wrapped
from raycomp.core.compressor import Compressor
from raycomp.distillation import LayerwiseDistiller
from raycomp.errors import ConfigError
from raycomp.pruning import Pruner
from raycomp.pruning.bases.scheduled import ScheduledPruner, StepwisePruner
from raycomp.quantization import Quantizer


@pytest.mark.parametrize("base", [Compressor, Pruner, Quantizer, LayerwiseDistiller, ScheduledPruner, StepwisePruner])
def test_a_base_can_not_be_constructed(base: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="it is the base of others"):
        base(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert not is_wrapped(model)
