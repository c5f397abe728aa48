from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_operator_registry() -> Iterator[None]:
    """The ONNX exporter compiles its 500 operators anew for every export, which is half of a small model's time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    cached = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", cached)
        yield
