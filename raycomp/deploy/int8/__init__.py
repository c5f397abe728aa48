"""Real int8: calibrated models as ONNX that ONNX Runtime computes in integers."""

from __future__ import annotations

from raycomp.deploy.int8.int8 import Int8Model, foreseen_hindrances, lower_int8, sqnr_db
from raycomp.deploy.int8.reference import simulate_int8

__all__ = ["Int8Model", "foreseen_hindrances", "lower_int8", "simulate_int8", "sqnr_db"]
