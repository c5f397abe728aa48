"""Masks as values: which elements of a model's targets stay, and how each mask is applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from raycomp.config import canonical_target
from raycomp.config.values import shown
from raycomp.core.target import TargetId
from raycomp.errors import CompressionError

ApplyMethod = Literal["mul", "add", "bypass"]

SOFTMAX_ZERO = -1000.0
"""What `add` adds where masked: exp of it is 0 (NNI's value)."""


def apply_mask(value: Tensor, mask: Tensor, method: ApplyMethod) -> Tensor:
    """The masked value: `mul` zeroes, `add` adds `SOFTMAX_ZERO` where masked, `bypass` leaves all as it is.

    Args:
        value: floating-point, of a shape that the mask broadcasts to.
        mask: 1 = keep.
        method: how it is applied.
    """
    if method == "bypass":
        return value
    mask = mask.to(value.dtype)
    return value * mask if method == "mul" else value + (1 - mask) * SOFTMAX_ZERO


def fits(mask: Tensor, shape: Sequence[int]) -> bool:
    """Whether a mask broadcasts to a value of this shape."""
    if mask.shape == shape:
        # Of nearly all masks, in each forward pass.
        return True
    behind = zip(reversed(mask.shape), reversed(shape), strict=False)
    return mask.dim() <= len(shape) and all(size in (1, whole) for size, whole in behind)


def _check_tensors(module: Any, targets: Any) -> None:
    if not isinstance(module, str):
        raise CompressionError(
            f"got {shown(module)} as a module", where=f"masks[{module!r}]", remedy="its name in the model"
        )
    for target, mask in targets.items() if isinstance(targets, Mapping) else [("", targets)]:
        where = f"masks[{module!r}][{target!r}]"
        if not isinstance(targets, Mapping) or not isinstance(target, str):
            raise CompressionError(f"got {shown(targets)}", where=f"masks[{module!r}]", remedy="{target: tensor}")
        if not isinstance(mask, Tensor) or mask.layout != torch.strided or mask.is_meta:
            raise CompressionError(f"got {shown(mask)}", where=where, remedy="a dense tensor with its values")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise CompressionError("it has other values than 0 and 1", where=where, remedy="1 = keep, 0 = masked")


class Masks(dict[str, dict[str, Tensor]]):
    """{module: {target: mask}}, 1 = keep, in each target's full shape (or one that broadcasts to it).

    Args:
        masks: the masks.
        methods: how each is applied where it isn't by multiplication: `add` adds -1000 where masked, `bypass` leaves
            the value as it is.
    """

    def __init__(
        self,
        masks: Mapping[str, Mapping[str, Tensor]] | None = None,
        methods: Mapping[TargetId, ApplyMethod] | None = None,
    ) -> None:
        super().__init__({module: dict(targets) for module, targets in (masks or {}).items()})
        given = methods if methods is not None else getattr(masks, "methods", {})
        self.methods: dict[TargetId, ApplyMethod] = dict(given)

    def method(self, module: str, target: str) -> ApplyMethod:
        """How the mask of a target is applied."""
        return self.methods.get(TargetId(module, target), "mul")

    def put(self, target_id: TargetId, mask: Tensor, method: ApplyMethod = "mul") -> None:
        """Adds a mask; one that is there already is multiplied with it, since both hold."""
        targets = self.setdefault(target_id.module, {})
        present = targets.get(target_id.target)
        targets[target_id.target] = mask if present is None else present * mask
        if method != "mul":
            self.methods[target_id] = method

    @classmethod
    def canonical(cls, masks: Mapping[str, Mapping[str, Tensor]]) -> Masks:
        """The masks with how each is applied, and every target by its full name (`_input_` is short for `_input_0`).

        Raises:
            CompressionError: they are no tensors of zeros and ones by module and target.
        """
        if not isinstance(masks, Mapping):
            raise CompressionError(f"got {shown(masks)}", where="masks", remedy="{module: {target: tensor}}")
        for module, targets in masks.items():
            _check_tensors(module, targets)
        given, result = cls(masks), cls({module: {} for module in masks})
        for target_id, mask in given.by_target():
            result.put(TargetId(target_id.module, canonical_target(target_id.target)), mask, given.method(*target_id))
        return result

    def by_target(self) -> Iterator[tuple[TargetId, Tensor]]:
        """Each target and its mask."""
        for module, targets in self.items():
            for target, mask in targets.items():
                yield TargetId(module, target), mask

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.methods)


# So that `torch.load` reads, as weights alone, the masks that `torch.save` wrote.
torch.serialization.add_safe_globals([Masks, TargetId])
