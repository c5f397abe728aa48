"""One rule for every operator that speedup can cut through."""

from __future__ import annotations

from raycomp.speedup.rules import contraction, elementwise, filling, lookup, movement, norm, pool, reduction
from raycomp.speedup.rules.base import RULES, Absorption, Channels, Kept, NewAttribute, Registry, Rule, Sink

__all__ = [
    "RULES",
    "Absorption",
    "Channels",
    "Kept",
    "NewAttribute",
    "Registry",
    "Rule",
    "Sink",
    "contraction",
    "elementwise",
    "filling",
    "lookup",
    "movement",
    "norm",
    "pool",
    "reduction",
]
