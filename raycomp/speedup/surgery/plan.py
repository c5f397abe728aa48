"""The surgery plan: what is cut, so that it can be repeated on a fresh instance of the user's class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from raycomp.speedup.graph.value_masks import ValueMask
from raycomp.speedup.surgery.plan_text import FORMAT, PlanText, SurgeryText, read_plan


@dataclass(frozen=True)
class Cut:
    """Coordinates that stay of one dimension of a parameter or buffer.

    Args:
        tensor: its full name.
        dim: the dimension.
        size: its size before.
        keep: the coordinates that stay, ascending.
    """

    tensor: str
    dim: int
    size: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """What stays of one group of a grouped weight: rows of the whole weight, columns within the group."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class BlockCut:
    """What stays of a grouped weight, group by group, in its first two dimensions.

    Args:
        tensor: its full name.
        shape: its first two sizes before.
        blocks: the groups that stay.
    """

    tensor: str
    shape: tuple[int, int]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Attribute:
    """A size that a module states as an attribute."""

    module: str
    name: str
    old: int
    new: int


@dataclass(frozen=True)
class NewBias:
    """A bias that a module gets, because it absorbs constants of what was removed before it."""

    module: str
    size: int


@dataclass(frozen=True)
class ActivationCut:
    """Coordinates that stay of one dimension of a module's first input or output; nothing is done for it."""

    module: str
    target: str
    dim: int
    size: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Surgery:
    """One stage's cuts. `graph` is the rewritten forward, where the user's code states sizes as constants."""

    cuts: tuple[Cut, ...] = ()
    block_cuts: tuple[BlockCut, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    biases: tuple[NewBias, ...] = ()
    value_masks: tuple[ValueMask, ...] = ()
    activations: tuple[ActivationCut, ...] = ()
    graph: Mapping[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a fresh instance changes."""
        return not (self.cuts or self.block_cuts or self.biases or self.value_masks or self.graph)


@dataclass(frozen=True)
class Plan:
    """All stages' cuts, in order."""

    surgeries: tuple[Surgery, ...] = ()

    def then(self, later: Plan) -> Plan:
        """This plan followed by another, which was made on the model that this one gives."""
        return replace(self, surgeries=self.surgeries + later.surgeries)

    def to_json(self) -> str:
        """The plan as text; equal lists of coordinates are written once."""
        table: list[list[int]] = []
        numbers: dict[tuple[int, ...], int] = {}

        def number(keep: tuple[int, ...]) -> int:
            if keep not in numbers:
                numbers[keep] = len(table)
                table.append(list(keep))
            return numbers[keep]

        stages = []
        for surgery in self.surgeries:
            stage = asdict(surgery)
            for entry in (*stage["cuts"], *stage["activations"]):
                entry["keep"] = number(entry["keep"])
            for entry in stage["block_cuts"]:
                entry["blocks"] = [[number(b["rows"]), number(b["columns"])] for b in entry["blocks"]]
            stages.append(stage)
        return json.dumps({"format": FORMAT, "keep": table, "surgeries": stages}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes, most_added: int | None = None) -> Plan:
        """The plan that `to_json` wrote.

        Args:
            text: JSON.
            most_added: how many elements it may add to a model, where the state that fills them tells.

        Raises:
            SpeedupError: the text isn't a plan.
        """
        read = read_plan(text) if most_added is None else read_plan(text, most_added)
        return Plan(tuple(_surgery(stage, read) for stage in read.surgeries))


def _surgery(stage: SurgeryText, plan: PlanText) -> Surgery:
    return Surgery(
        cuts=tuple(Cut(e.tensor, e.dim, e.size, plan.kept(e.keep, e.size)) for e in stage.cuts),
        block_cuts=tuple(
            BlockCut(
                e.tensor,
                (e.shape[0], e.shape[1]),
                tuple(Block(plan.kept(r, e.shape[0]), plan.kept(c, e.shape[1])) for r, c in e.blocks),
            )
            for e in stage.block_cuts
        ),
        attributes=tuple(Attribute(e.module, e.name, e.old, e.new) for e in stage.attributes),
        biases=tuple(NewBias(e.module, e.size) for e in stage.biases),
        value_masks=tuple(ValueMask(e.module, e.target, tuple(e.shape), e.method) for e in stage.value_masks),
        activations=tuple(
            ActivationCut(e.module, e.target, e.dim, e.size, plan.kept(e.keep, e.size)) for e in stage.activations
        ),
        graph=stage.graph,
    )
