"""Pruners: masks on the targets of a model, made while it trains."""

from raycomp.config.registry import export_algorithms
from raycomp.pruning.pruner import Pruner as Pruner

__all__, __getattr__, __dir__ = export_algorithms(__name__, "pruner", Pruner)
