"""Distillers: a teacher's outputs in the student's loss."""

from raycomp.distillation.distiller import LayerwiseDistiller
from raycomp.distillation.dynamic import DynamicLayerwiseDistiller

__all__ = ["DynamicLayerwiseDistiller", "LayerwiseDistiller"]
