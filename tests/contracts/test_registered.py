"""What a registration promises: the algorithm is where it says, and its package exports it."""

from __future__ import annotations

import pytest

from raycomp import distillation, pruning, quantization
from raycomp.config import COMPRESSORS, Need
from raycomp.config.compressors import SearchSettings
from tests.contracts.scripts import Algorithm, Run
from tests.contracts.settings import SETTINGS, settings

PACKAGES = {"pruner": pruning, "quantizer": quantization, "distiller": distillation}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_algorithm_is_there(name: str) -> None:
    found = getattr(PACKAGES[COMPRESSORS[name].kind], name)
    assert found is COMPRESSORS[name].load()
    assert found.__name__ == name


@pytest.mark.parametrize("name", SETTINGS)
def test_what_an_algorithm_is_registered_to_need_is_what_it_asks_for(name: str) -> None:
    chain = Run(Algorithm(name, (settings(name),))).chain
    asked = {
        Need.TRAINING: chain.rounds > 0,
        Need.ROUNDS: chain.rounds > 1,
        Need.CALIBRATION: chain.calibrates,
        Need.SEARCH: issubclass(COMPRESSORS[name].settings, SearchSettings),
        Need.TEACHER: COMPRESSORS[name].kind == "distiller",
    }
    assert COMPRESSORS[name].needs == {need for need, is_asked in asked.items() if is_asked}
