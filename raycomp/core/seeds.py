"""Random numbers that belong to what they are drawn for: a run, an epoch, a sample; the same on every machine."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def seed_generators(seed: int) -> None:
    """Seeds the generators that code draws from without naming one: torch's on the CPU, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def seed_everything(seed: int) -> None:
    """The same, and torch's generators of all devices."""
    torch.manual_seed(seed)
    seed_generators(seed)


@contextmanager
def restored_generators() -> Iterator[None]:
    """The generators of `seed_generators` are after the block as they were before it."""
    states = _states()
    try:
        yield
    finally:
        _set_states(states)


class OwnGenerators:
    """States of the global generators for code that runs in between, and goes on each time where it was.

    Args:
        seed: what it begins with.
    """

    def __init__(self, seed: int) -> None:
        with restored_generators():
            seed_generators(seed)
            self._states = _states()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within the block, what is drawn is drawn from these."""
        with restored_generators():
            _set_states(self._states)
            yield
            self._states = _states()


def _states() -> tuple[Any, Any, Any]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None


def _set_states(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])
