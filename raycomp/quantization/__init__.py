"""Quantizers: fake quantization on the targets of a model while it trains."""

from raycomp.config.registry import export_algorithms
from raycomp.quantization.quantizer import Quantizer as Quantizer

__all__, __getattr__, __dir__ = export_algorithms(__name__, "quantizer", Quantizer)
