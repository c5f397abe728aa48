"""What a registration promises: the algorithm is where it says, and its package exports it."""

from __future__ import annotations

import pytest

from raycomp import distillation, pruning, quantization
from raycomp.config import COMPRESSORS

PACKAGES = {"pruner": pruning, "quantizer": quantization, "distiller": distillation}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_algorithm_is_there(name: str) -> None:
    found = getattr(PACKAGES[COMPRESSORS[name].kind], name)
    assert found is COMPRESSORS[name].load()
    assert found.__name__ == name
