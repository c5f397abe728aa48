"""How compressors train a model, calibrate and judge it outside of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raycomp.config.registry import absent
from raycomp.evaluators.plain import TorchEvaluator

__all__ = ["TorchEvaluator"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        raise absent(__name__, name, __all__)
