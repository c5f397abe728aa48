"""Fused pruning, quantization and distillation of PyTorch models on Ray clusters: verified, resumable, stored."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CompressionJob": "raycomp.distributed.job",
    "Progress": "raycomp.distributed.progress",
    "ProgressEvent": "raycomp.results.progress",
    "Task": "raycomp.pipeline.task",
    "TorchEvaluator": "raycomp.evaluators.plain",
    "align_followers": "raycomp.speedup",
    "auto_set_denpendency_group_ids": "raycomp.speedup",
    "auto_set_dependency_group_ids": "raycomp.speedup",
    "load": "raycomp.pipeline.ending.load",
    "register_template": "raycomp.core.selection",
    "trace": "raycomp.config.nni",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import raycomp` brings neither torch nor Ray."""
    if name not in _PUBLIC:
        raise import_module("raycomp.config.registry").absent(__name__, name, __all__)
    return getattr(import_module(_PUBLIC[name]), name)
