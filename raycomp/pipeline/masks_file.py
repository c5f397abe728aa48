"""Masks in a file."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter

from raycomp.core.masks import ApplyMethod, Masks
from raycomp.core.target import TargetId
from raycomp.storage import load_metadata, load_tensors, save_tensors
from raycomp.storage.documents import ManyNamed, parse_document

_METHODS = "apply_methods"
_ADAPTER = TypeAdapter(ManyNamed[ApplyMethod])


def save_masks(path: Path, masks: Masks) -> None:
    """Writes masks as tensors named `module.target`, and how they are applied where it isn't by multiplication."""
    tensors = {str(target_id): mask for target_id, mask in masks.by_target()}
    methods = {str(key): method for key, method in masks.methods.items()}
    save_tensors(path, tensors, (_METHODS, json.dumps(methods)))


def load_masks(path: Path) -> Masks:
    """What `save_masks` wrote."""
    methods = parse_document(_ADAPTER, load_metadata(path).get(_METHODS, "{}"), "how masks are applied", str(path))
    masks = Masks()
    for name, mask in load_tensors(path).items():
        # A target's name has no dot.
        module, _, target = name.rpartition(".")
        masks.put(TargetId(module, target), mask, methods.get(name, "mul"))
    return masks
