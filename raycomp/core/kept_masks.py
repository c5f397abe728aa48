"""Masks that a model brings with it from an earlier stage."""

from __future__ import annotations

from raycomp.core.chain import Chain
from raycomp.core.mask import Mask
from raycomp.core.masks import Masks
from raycomp.core.model import device_of
from raycomp.core.moments import Moments
from raycomp.core.target import target_kind


class KeptMasks(Moments):
    """Masks of an earlier stage that speedup did not cut: they hold while the model trains on, and are handed on.

    Args:
        chain: of the model.
        masks: in the coordinates of the model.
    """

    def __init__(self, chain: Chain, masks: Masks) -> None:
        self.chain = chain
        self.masks = {
            target_id: Mask.of(mask.to(device_of(chain.model)), masks.method(*target_id))
            for target_id, mask in masks.by_target()
        }
        chain.register(self)

    @property
    def wants_training(self) -> bool:
        return False

    def attach(self) -> None:
        for target_id, mask in self.masks.items():
            self.chain.space.target(target_id).add("masks", mask)

    def commit(self) -> None:
        for target_id, mask in self.masks.items():
            if target_kind(target_id.target) == "parameter":
                mask.commit_(self.chain.space.parameter(target_id))

    def get_masks(self) -> Masks:
        kept = Masks()
        for target_id, mask in self.masks.items():
            kept.put(target_id, mask.mask.detach().clone(), mask.method)
        return kept
