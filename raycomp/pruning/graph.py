"""What goes with the channels of a pruner's targets, from the model's graph."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from raycomp.config import PruneTarget, parse_config_list
from raycomp.core.coupling import Coupling
from raycomp.core.layout import Layout
from raycomp.core.selection import Selection, resolve
from raycomp.core.target import TargetId
from raycomp.errors import ConfigError, Problem
from raycomp.pruning.budget import Costs
from raycomp.speedup.analysis.coupling import coupling
from raycomp.speedup.analysis.dependency import TracedModel, layers_of
from raycomp.speedup.config_list import complete_config_list


def in_groups(model: nn.Module, selection: Selection, example: Any) -> Selection:
    """The selection with groups of what can only go together, and with what follows: only such masks can be cut out,
    and a budget is that of the model behind speedup. Errors as of `with_coupling`."""
    _refuse_none(example)
    given = [entry.model_dump() for entry in selection.entries]
    entries = parse_config_list("pruner", complete_config_list(model, given, example))
    return resolve(model, "pruner", entries, "config_list", example)


def with_coupling(model: nn.Module, selection: Selection, example: Any) -> Selection:
    """The selection with what the graph says of the channels of all layers.

    Raises:
        ConfigError: there is no example input to trace the model with.
        SpeedupError: the model can't be traced.
    """
    _refuse_none(example)
    traced = TracedModel.of(model, example)
    return replace(selection, coupling=coupling(traced, layers_of(traced)))


def _refuse_none(example: Any) -> None:
    if example is None:
        message = "which channels go together is found from the model's graph, and there is no example input"
        raise ConfigError([Problem("config_list", message, "give the evaluator a dummy_input")])


def costs(found: Coupling, selected: Iterable[TargetId], layouts: Mapping[TargetId, Layout]) -> Costs:
    """What masks cost; those of targets whose channels can't go, or not by the masks of these targets alone, have none.

    A channel goes where all layers that make it are masked, or all norms behind these: one for each of the layers, at
    least, for what has no norm would stay.

    Args:
        found: what goes with each channel.
        selected: all targets that are masked.
        layouts: of these.
    """
    masked = {target_id.module for target_id in selected if target_id.target == "weight"}
    channels: dict[Hashable, tuple[int, ...]] = {}
    for target_id in selected:
        layout = layouts[target_id]
        own = found.channels_of(str(target_id), layout.channel_dim or 0) if layout.is_parameter else None
        if own is None or target_id.target != "weight":
            continue
        makers, norms = found.makers(own), found.norms(own)
        if makers <= masked or (target_id.module in norms and norms <= masked and len(norms) >= len(makers)):
            channels[target_id] = own
    return Costs(found, channels)


def by_macs(selection: Selection, part: float) -> Selection:
    """A selection with a part of the multiply-accumulates in place of budgets of latency."""

    def changed(settings: Any) -> Any:
        if not isinstance(settings, PruneTarget) or settings.budget is None or not settings.budget.is_timed:
            return settings
        return settings.model_copy(update={"budget": settings.budget.by_macs(part)})

    selected = {key: replace(item, settings=changed(item.settings)) for key, item in selection.selected.items()}
    return replace(selection, selected=selected)
