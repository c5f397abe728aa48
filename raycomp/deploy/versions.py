"""The versions that a file was written with."""

from __future__ import annotations

import contextlib
import importlib.metadata

_PACKAGES = ("raycomp", "torch", "onnx", "onnxscript", "onnxruntime")


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide what an exported file looks like."""
    installed = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
