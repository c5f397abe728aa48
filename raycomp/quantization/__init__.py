"""Quantizers: fake quantization on the targets of a model while it trains."""

from raycomp.quantization.ptq import PtqQuantizer
from raycomp.quantization.qat import QATQuantizer
from raycomp.quantization.quantizer import Quantizer

__all__ = ["PtqQuantizer", "QATQuantizer", "Quantizer"]
