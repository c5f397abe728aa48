from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_operator_registry() -> Iterator[None]:
    """The ONNX exporter compiles its 500 operators anew for every export, which is half of a small model's time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    original = ONNXRegistry.__dict__["from_torchlib"]
    ONNXRegistry.from_torchlib = functools.cache(ONNXRegistry.from_torchlib)  # type: ignore[method-assign]
    yield
    ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]
