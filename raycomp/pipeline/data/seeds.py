"""Random numbers that belong to what they are drawn for: a run, an epoch, a sample; the same on every machine."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])
