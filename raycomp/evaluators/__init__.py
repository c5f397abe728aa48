"""How compressors train a model, calibrate and judge it outside of a job."""

from raycomp.evaluators.plain import TorchEvaluator

__all__ = ["TorchEvaluator"]
