"""Two hundred random changes of an artifact: each loads, or ends in one of raycomp's errors."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.security.mutants import mutant, outcome

SEEDS = 200


def test_every_mutant_loads_or_is_one_error(real: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ends: Counter[str] = Counter()
    for seed in range(SEEDS):
        uri, what = mutant(real, tmp_path / "mutant", seed)
        try:
            ends[outcome(uri)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} ({what}) ended in {error!r}") from error
        shutil.rmtree(tmp_path / "mutant")
    # Changes that nothing reads, or that give other numbers, load; most are seen.
    assert ends["error"] > SEEDS // 2 and ends["loaded"] > SEEDS // 20
    assert "\x1b" not in "".join(capfd.readouterr())
