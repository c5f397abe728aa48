"""Distillers: a teacher's outputs in the student's loss."""

from raycomp.distillation.adaptive import Adaptive1dLayerwiseDistiller
from raycomp.distillation.distiller import LayerwiseDistiller
from raycomp.distillation.dynamic import DynamicLayerwiseDistiller

__all__ = ["Adaptive1dLayerwiseDistiller", "DynamicLayerwiseDistiller", "LayerwiseDistiller"]
