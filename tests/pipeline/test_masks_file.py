"""Masks survive a file, and equal masks give equal files."""

from __future__ import annotations

from pathlib import Path

import torch

from raycomp.core.masks import Masks
from raycomp.core.target import TargetId
from raycomp.pipeline.masks_file import load_masks, save_masks


def test_masks_come_back_as_they_are_applied(tmp_path: Path) -> None:
    masks = Masks({"a.b": {"weight": torch.tensor([1.0, 0.0])}}, {TargetId("a.b", "weight"): "bypass"})
    masks.put(TargetId("", "_input_0"), torch.zeros(1, 2), "add")
    save_masks(tmp_path / "one", masks)
    again = load_masks(tmp_path / "one")
    assert {key: mask.tolist() for key, mask in again.by_target()} == {
        TargetId("a.b", "weight"): [1, 0],
        TargetId("", "_input_0"): [[0, 0]],
    }
    assert [again.method(*key) for key, _ in again.by_target()] == [masks.method(*key) for key, _ in again.by_target()]
    assert {again.method("a.b", "weight"), again.method("", "_input_0")} == {"bypass", "add"}


def test_equal_masks_give_equal_files(tmp_path: Path) -> None:
    contents = set()
    for number in range(8):
        save_masks(tmp_path / str(number), Masks({"a": {"weight": torch.ones(3)}}))
        contents.add((tmp_path / str(number)).read_bytes())
    assert len(contents) == 1
