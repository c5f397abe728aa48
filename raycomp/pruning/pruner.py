"""The base of pruners: masks on targets, and the decisions of a schedule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycomp.config import PruneTarget, nearest
from raycomp.config.entries import Granularity
from raycomp.core.chain import Chain
from raycomp.core.compressor import Compressor, ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.finite import are_finite
from raycomp.core.layout import Layout, layout_of
from raycomp.core.mask import Mask
from raycomp.core.masks import Masks, fits
from raycomp.core.model import device_of
from raycomp.core.moments import Moment
from raycomp.core.selection import Kind, Selected, Selection
from raycomp.core.target import TargetId, target_kind
from raycomp.errors import CompressionError, ConfigError, NotFiniteError, Problem
from raycomp.pruning.alignment import Follower, alignment_problems, followed_mask, followers, in_order
from raycomp.pruning.budget import Costs
from raycomp.pruning.graph import by_macs, costs, in_groups, with_coupling
from raycomp.pruning.masks import MaskRequest, make_masks
from raycomp.pruning.saliency import block_elements, block_sizes, expand_blocks
from raycomp.pruning.schedule import Once, Schedule


class Pruner(Compressor):
    """A pruner decides its masks at the moments of a schedule, from saliencies that a subclass gives.

    Args:
        model: the model, or a chain to fuse with.
        config_list: see `Compressor`; keys are those of `PruneEntry`.
        evaluator: how to train, where the algorithm needs it.
    """

    kind: ClassVar[Kind] = "pruner"
    grows_back: ClassVar[bool] = False
    """Whether blocks that one decision pruned may be kept by the next."""
    default_granularity: Granularity = "out_channel"
    """Of parameters."""
    coupled: ClassVar[bool] = False
    """Whether its saliencies are of all weights that go together, which the model's graph tells."""
    searchable: ClassVar[bool] = True
    """Whether each target may be given a ratio of its own."""
    ranks_values: ClassVar[bool] = False
    """Whether inputs and outputs may have goals of their own."""

    def __init__(self, model: nn.Module | Chain, config_list: ConfigList, evaluator: Evaluator | None = None) -> None:
        self.masks: dict[TargetId, Mask] = {}
        self._blocks: dict[TargetId, tuple[int, ...]] = {}
        super().__init__(model, config_list, evaluator)
        self.schedule = self.own_schedule()

    @property
    def rounds(self) -> int:
        return self.schedule.rounds

    @property
    def rewinds(self) -> bool:
        return self.schedule.rewinds

    def steps_to_go(self) -> int | None:
        return max(self.schedule.last_step - self.chain.step, 0) or None

    @classmethod
    def granularity_under(cls, settings: object) -> Granularity:
        """What is pruned together of a parameter whose entry doesn't say, under a job's settings of this class."""
        return cls.default_granularity

    @classmethod
    def completed(cls, model: nn.Module, selection: Selection, example: Any) -> Selection:
        """A selection with what the graph says of channels, where its settings or the algorithm ask for it.

        Raises:
            ConfigError: there is no example input to trace the model with.
            SpeedupError: the model can't be traced.
        """
        settings = [item.settings for item in selection.selected.values()]
        has_budget = any(isinstance(each, PruneTarget) and each.budget is not None for each in settings)
        if selection.coupling is not None or not (has_budget or cls.coupled):
            return selection
        return with_coupling(model, in_groups(model, selection, example) if has_budget else selection, example)

    # What a subclass says.

    def own_schedule(self) -> Schedule:
        """When it decides, without a schedule around it."""
        return Once(self.window)

    @property
    def window(self) -> int:
        """How many steps before a decision its statistics are collected."""
        return 0

    @abstractmethod
    def saliencies(self) -> dict[TargetId, Tensor]:
        """The saliency of every block of every target that has a goal of its own, from merged statistics."""

    def make_mask(self, target_id: TargetId) -> Mask:
        """The module that masks a target."""
        layout = self.layouts[target_id]
        shape = layout.shape if layout.is_parameter else ()
        if not layout.is_parameter and target_id in self.goals:
            shape = tuple(self._expanded(target_id, torch.ones(self.grid(target_id))).shape)
        assert shape is not None
        return Mask(shape, self._settings(target_id).apply_method, has_rank=self._has_rank(target_id, layout))

    def ranked(self, target_id: TargetId, values: Tensor) -> Tensor:
        """Values of a target's blocks in the order in which masks are made of them."""
        if self.layouts[target_id].groups > 1 and self._granularity(target_id) == "out_channel":
            # Channels in their order, as the other members of a dependency group have them.
            return values.flatten()
        return values

    def from_ranked(self, target_id: TargetId, values: Tensor) -> Tensor:
        """The inverse of `ranked`: in the shape of the target's grid."""
        return values.view(self.grid(target_id))

    # Its targets.

    @cached_property
    def followers(self) -> dict[TargetId, Follower]:
        """The targets whose masks follow others."""
        return followers(self.selected)

    @cached_property
    def goals(self) -> dict[TargetId, Selected]:
        """The targets that have a goal of their own; the others follow by align."""
        return {key: item for key, item in self.selected.items() if key not in self.followers}

    def blocks(self, target_id: TargetId) -> tuple[int, ...]:
        """The block sizes of a target's granularity."""
        if target_id not in self._blocks:
            self._blocks[target_id] = block_sizes(self._granularity(target_id), self.layouts[target_id])
        return self._blocks[target_id]

    def grid(self, target_id: TargetId) -> list[int]:
        """How many blocks a target has in each dimension: the shape of its saliency."""
        blocks = self.blocks(target_id)
        shape = self.layouts[target_id].shape
        assert shape is not None
        return [dim // block for dim, block in zip(shape, blocks, strict=True)]

    def count(self, target_id: TargetId) -> int:
        """How many blocks a target has."""
        return prod(self.grid(target_id))

    def is_of_channels(self, target_id: TargetId) -> bool:
        """Whether a parameter's blocks are output channels, or runs of them, with all that is in them."""
        layout = self.layouts[target_id]
        assert layout.shape is not None
        whole = [size // layout.groups if dim == 0 else size for dim, size in enumerate(layout.shape)]
        sizes = zip(self.blocks(target_id), whole, strict=True)
        return all(block == size for dim, (block, size) in enumerate(sizes) if dim != (layout.channel_dim or 0))

    def check(self) -> None:
        """Refuses goals that it can't rank, blocks that don't fit, and align cycles."""
        problems: list[Problem] = []
        for target_id, selected in self.goals.items():
            problems += self._goal_problems(target_id, selected)
        earlier = self.chain.masks()
        problems += self._method_problems(earlier)
        masked = [*self.selected, *(target_id for target_id, _ in earlier.by_target())]
        sources = {follower.source for follower in self.followers.values() if follower.source in masked}
        layouts = {**{source: self._layout(source) for source in sources}, **self.layouts}
        problems += alignment_problems(self.selected, self.followers, masked, layouts)
        if problems:
            raise ConfigError(problems)

    # The moments.

    def attach(self) -> None:
        fresh = not self.masks
        for target_id in self.selected:
            if target_id not in self.masks:
                self.masks[target_id] = self.make_mask(target_id).to(device_of(self.model))
            self.chain.space.target(target_id).add("masks", self.masks[target_id])
        if fresh:
            # Masks have their shapes from the beginning, so that a copy of the model can take over their values.
            self.follow()

    def is_due(self, moment: Moment) -> bool:
        return self.schedule.progress(moment) is not None or any(leader.is_due(moment) for leader in self._leaders())

    def decide(self, moment: Moment) -> None:
        """Makes and sets the masks that are due, and lets followers follow.

        Raises:
            ConfigError: members of a group don't fit each other.
            NotFiniteError: a saliency is not a finite number.
        """
        progress = self.schedule.progress(moment)
        if progress is not None:
            self.set_masks(self.saliencies(), progress)
        self.follow()

    def requests(self, saliencies: Mapping[TargetId, Tensor], progress: float) -> list[MaskRequest]:
        """What masks are made from."""
        return [self._request(target_id, saliency, progress) for target_id, saliency in saliencies.items()]

    @cached_property
    def costs(self) -> Costs | None:
        """What its masks cost, where it was asked for."""
        found = self.selection.coupling
        if found is None:
            return None
        goals = [key for key in self.goals if self.layouts[key].is_parameter and self.is_of_channels(key)]
        return costs(found, [*goals, *self.followers], self.layouts)

    def set_masks(self, saliencies: Mapping[TargetId, Tensor], progress: float) -> None:
        """Makes and sets the masks of these saliencies; errors as in `decide`."""
        for target_id, mask in self.made_masks(saliencies, progress).items():
            self.masks[target_id].set_(mask)

    def made_masks(self, saliencies: Mapping[TargetId, Tensor], progress: float) -> dict[TargetId, Tensor]:
        """The masks of these saliencies; errors as in `decide`."""
        if not are_finite(saliencies.values()):
            bad = next(key for key, saliency in saliencies.items() if not are_finite([saliency]))
            raise NotFiniteError(f"the saliency of {bad} is not finite")
        try:
            made, notes = make_masks(self.requests(saliencies, progress), self.costs)
        except ValueError as error:
            raise ConfigError([Problem("config_list", str(error))]) from None
        self.chain.tell(f"{type(self).__name__}: {note}" for note in notes)
        return {key: self._expanded(key, self.from_ranked(key, made[key])) for key in saliencies}

    def choose(self, selection: Selection) -> None:
        """Prunes by other settings from now on, of the same targets."""
        assert selection.selected.keys() == self.selected.keys()
        self.selection, self.selected = selection, dict(selection.selected)
        self._blocks.clear()

    def begin_again(self) -> None:
        """Decides as it did, from where the training is now; what is masked stays so."""
        self.schedule = self.own_schedule()
        self.decide(Moment("begin", 0, self.chain.round))

    def rehearse(self) -> None:
        """Sets the masks of made-up saliencies; a latency, which a job has yet to measure, counts as half the work."""
        asked = self.selection
        self.choose(by_macs(asked, 0.5))
        made_up = {target_id: torch.Size(self.grid(target_id)) for target_id in self.goals}
        self.set_masks({key: torch.arange(grid.numel()).float().view(grid) for key, grid in made_up.items()}, 1.0)
        self.follow()
        self.choose(asked)

    def commit(self) -> None:
        """Zeroes the masked elements of the parameters for good."""
        for target_id, mask in self.masks.items():
            if target_kind(target_id.target) == "parameter":
                mask.commit_(self.chain.space.parameter(target_id))

    def notes(self) -> list[str]:
        done, last = self.chain.step, self.schedule.last_step
        if done >= last or not self.goals:
            return []
        message = f"the training ended after step {done}, the last masks are due after step {last}"
        return [f"{type(self).__name__}: {message}: the goal is not reached"]

    # What it has to give.

    def get_masks(self) -> Masks:
        """{module: {target: mask}}; 1 = keep."""
        masks = Masks()
        for target_id, mask in self.masks.items():
            masks.put(target_id, mask.mask.detach().clone(), mask.method)
        return masks

    def update_masks(self, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Sets masks that were stored before.

        Raises:
            CompressionError: a target that this pruner doesn't have, or a mask that doesn't fit it.
        """
        canonical = Masks.canonical(masks)
        given = dict(canonical.by_target())
        for target_id, mask in given.items():
            if target_id not in self.masks:
                remedy = nearest(str(target_id), map(str, self.masks))
                raise CompressionError(f"{type(self).__name__} has no such target", where=str(target_id), remedy=remedy)
            self._check_fit(target_id, mask)
        ours = {target_id.module for target_id in self.masks}
        for module in canonical.keys() - ours:
            message, remedy = f"{type(self).__name__} prunes no such module", nearest(module, ours)
            raise CompressionError(message, where=f"masks[{module!r}]", remedy=remedy)
        for target_id, mask in given.items():
            self.masks[target_id].set_(mask)

    def _check_fit(self, target_id: TargetId, mask: Tensor) -> None:
        layout, has_rank = self.layouts[target_id], self.masks[target_id].has_rank
        given = f"the mask's shape is {tuple(mask.shape)}"
        if layout.is_parameter:
            if tuple(mask.shape) != layout.shape:
                raise CompressionError(f"{given}, the parameter's {layout.shape}", where=str(target_id))
            return
        if mask.dim() and mask.shape[0] != 1:
            remedy = "one mask for all samples: a first dimension of 1"
            raise CompressionError(
                f"{given}: its first dimension is not the batch's", where=str(target_id), remedy=remedy
            )
        is_short = mask.dim() == 2 and not has_rank
        if layout.rank is not None and mask.dim() not in (0, layout.rank) and not is_short:
            remedy = f"should have {layout.rank}" + ("" if has_rank else ", or be [1, channels]")
            raise CompressionError(f"{given}: it has {mask.dim()} dimensions", where=str(target_id), remedy=remedy)
        if layout.shape is not None and not fits(mask, layout.shape[: 2 if is_short else None]):
            raise CompressionError(f"{given}, the value's {(1, *layout.shape[1:])}", where=str(target_id))

    def result(self) -> tuple[nn.Module, Masks]:
        """The model and its masks."""
        return self.model, self.get_masks()

    def _settings(self, target_id: TargetId) -> PruneTarget:
        settings = self.selected[target_id].settings
        assert isinstance(settings, PruneTarget)
        return settings

    def _granularity(self, target_id: TargetId) -> Any:
        granularity = self._settings(target_id).granularity
        if granularity != "default":
            return granularity
        return self.default_granularity if self.layouts[target_id].is_parameter else "per_channel"

    def _expanded(self, target_id: TargetId, keep: Tensor) -> Tensor:
        """The mask of a decision about blocks: of a parameter in its shape; of a value such that it broadcasts."""
        blocks = self.blocks(target_id)
        if not self.layouts[target_id].is_parameter:
            blocks = tuple(1 if count == 1 else block for count, block in zip(keep.shape, blocks, strict=True))
        return expand_blocks(keep, blocks)

    def _layout(self, target_id: TargetId) -> Layout:
        return self.layouts.get(target_id) or layout_of(self.model, target_id)

    def _has_rank(self, target_id: TargetId, layout: Layout) -> bool:
        """Whether the channels of an input or output are its last dimension; without an example, as classes tell."""
        dim = layout.channel_dim
        if dim is None and target_id in self.followers:
            dim = self._layout(self.followers[target_id].source).value_channel_dim
        return layout.shape is not None or dim == -1

    def _leaders(self) -> list[Pruner]:
        """The compressors fused before this one whose masks its own follow."""
        sources = [follower.source for follower in self.followers.values()]
        earlier = self.chain.members[: self.chain.members.index(self)]
        return [each for each in earlier if isinstance(each, Pruner) and any(key in each.masks for key in sources)]

    def _request(self, target_id: TargetId, saliency: Tensor, progress: float) -> MaskRequest:
        blocks = self.blocks(target_id)
        settings = self._settings(target_id)
        due = self.schedule.due(progress, self._goal(settings))
        stays = None if self.grows_back else self.ranked(target_id, self._pruned(target_id))
        elements = block_elements(blocks) // (1 if self.layouts[target_id].is_parameter else blocks[0])
        return MaskRequest(target_id, self.ranked(target_id, saliency), elements, settings, due, stays)

    def _pruned(self, target_id: TargetId) -> Tensor:
        """The blocks that are pruned already, in the shape of the target's grid."""
        return self.masks[target_id].mask[tuple(slice(None, None, block) for block in self.blocks(target_id))] == 0

    def _goal(self, settings: PruneTarget) -> float:
        """The part that goes: of a target by a ratio, of the model by a budget; 0 for a threshold."""
        if settings.budget is None or self.costs is None:
            return settings.sparse_ratio or 0.0
        parts = [self.costs.part(name, limit) for name, limit in settings.budget.limits().items()]
        return max(1 - min(parts, default=1.0), 0.0)

    def follow(self) -> None:
        """Sets the masks of the targets that follow others."""
        for follower in in_order(list(self.followers.values())):
            mask = self._mask_of(follower.source)
            theirs = self._layout(follower.source)
            made = followed_mask(follower, mask, self.layouts[follower.target_id], theirs)
            self.masks[follower.target_id].set_(made)

    def _mask_of(self, target_id: TargetId) -> Tensor:
        if target_id in self.masks:
            return self.masks[target_id].mask
        return self.chain.masks()[target_id.module][target_id.target]

    def _method_problems(self, earlier: Masks) -> list[Problem]:
        """Masks of one target multiply, which means nothing where they are applied in different ways."""
        problems = []
        for target_id, selected in self.selected.items():
            ours = self._settings(target_id).apply_method
            theirs = earlier.method(*target_id)
            if target_id.target in earlier.get(target_id.module, {}) and ours != theirs:
                message = f"{target_id} is masked by '{theirs}' already, not by '{ours}'"
                problems.append(Problem(f"{selected.where}.apply_method", message, "mask it in one way"))
        return problems

    def _goal_problems(self, target_id: TargetId, selected: Selected) -> list[Problem]:
        """What is wrong with a target that is to be ranked."""
        problems = []
        if not self.layouts[target_id].is_parameter and not self.ranks_values:
            message = f"{target_id}: {type(self).__name__} can't rank inputs or outputs"
            return [Problem(selected.where, message, "align it to a parameter of a module")]
        if self.layouts[target_id].is_parameter and self._settings(target_id).apply_method == "add":
            remedy = "mul, or put it on the softmax's `_input_0` with an align to this parameter"
            problems.append(Problem(f"{selected.where}.apply_method", f"{target_id}: add masks no parameter", remedy))
        try:
            self.blocks(target_id)
        except ValueError as error:
            return [*problems, Problem(f"{selected.where}.granularity", f"{target_id}: {error}")]
        settings, is_parameter = self._settings(target_id), self.layouts[target_id].is_parameter
        if settings.budget is not None and not (is_parameter and self.is_of_channels(target_id)):
            message = f"{target_id}: a budget says how many output channels go, and its blocks are others"
            problems.append(Problem(f"{selected.where}.granularity", message, "out_channel"))
        if settings.budget is not None and settings.apply_method != "mul":
            message = f"{target_id}: what '{settings.apply_method}' masks isn't cut out, so no budget can be met by it"
            problems.append(Problem(f"{selected.where}.apply_method", message, "mul"))
        return problems
