"""Distillers: a teacher's outputs in the student's loss."""

from raycomp.config.registry import export_algorithms
from raycomp.distillation.distiller import LayerwiseDistiller as LayerwiseDistiller

__all__, __getattr__, __dir__ = export_algorithms(__name__, "distiller", LayerwiseDistiller)
