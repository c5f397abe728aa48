"""Config lists that the graph completes: channels that go together get one mask, norms and biases follow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from raycomp.config import PruneEntry, SelectionEntry, parse_config_list
from raycomp.config.entries import Granularity
from raycomp.core.layout import layout_of
from raycomp.core.selection import default_targets, resolve, select, type_name
from raycomp.core.target import TargetId
from raycomp.speedup.analysis.dependency import TracedModel, dependencies, layers_of
from raycomp.speedup.analysis.study import Group
from raycomp.speedup.graph.example import Example

ConfigList = list[dict[str, Any]]

_SELECTION = set(SelectionEntry.model_fields) - {"target_names"}


def auto_set_dependency_group_ids(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Example
) -> ConfigList:
    """The config list with `dependency_group_id` and `internal_metric_block` where the graph asks for them.

    Layers whose output channels are added, or run through a depthwise convolution, get one group; what feeds or is a
    grouped convolution loses equally many channels in each of its groups; what a GroupNorm normalises goes in its
    groups. Entries that say otherwise themselves, entries that align to others, that prune other blocks than channels,
    and entries without a weight among their targets stay as they are.

    Args:
        model: the model.
        config_list: a pruner's config list.
        dummy_input: an example input.

    Returns:
        A new config list, in which entries that were changed name their modules one by one.

    Raises:
        ConfigError: the config list is wrong.
        SpeedupError: the model can't be traced.
    """
    return _with_groups(TracedModel.of(model, dummy_input), config_list)


auto_set_denpendency_group_ids = auto_set_dependency_group_ids
"""NNI's spelling."""


def complete_config_list(
    model: nn.Module,
    config_list: Sequence[Mapping[str, Any]],
    dummy_input: Example,
    *,
    groups: bool = True,
    align: bool = True,
    default: Granularity = "out_channel",
) -> ConfigList:
    """The config list under `auto_set_dependency_group_ids` and `align_followers`, of which each can be left out; the
    model is traced once. `default` is what its pruner prunes where an entry names no granularity. Errors as theirs."""
    result = [dict(entry) for entry in config_list]
    if not groups and not align:
        return result
    traced = TracedModel.of(model, dummy_input)
    if groups:
        result = _with_groups(traced, result, default)
    return _with_followers(traced, result) if align else result


def _with_groups(
    traced: TracedModel, config_list: Sequence[Mapping[str, Any]], default: Granularity = "out_channel"
) -> ConfigList:
    model = traced.model
    entries, selected = _selected(model, config_list)
    grouped = [_is_grouped_here(entry, default) for entry in entries]
    chosen = [name for is_grouped, own in zip(grouped, selected, strict=True) if is_grouped for name in own]
    names = [name for name in chosen if _has_channels(model, name)]
    groups = list(dependencies(traced, names, obstacles=False).groups) if names else []
    settings = {n: _settings(config_list[i]) for i, own in enumerate(selected) for n in own if grouped[i]}
    groups = _with_norms(traced, groups, [name for name in chosen if name not in names], settings)
    if not groups:
        return [dict(entry) for entry in config_list]
    numbers = _numbered(groups, settings)
    result: ConfigList = []
    for index, entry in enumerate(config_list):
        if grouped[index]:
            result += _by_group(model, dict(entry), selected[index], groups, numbers)
        else:
            result.append(dict(entry))
    return result


def _with_norms(
    traced: TracedModel, groups: Sequence[Group], norms: Sequence[str], settings: Mapping[str, dict[str, Any]]
) -> list[Group]:
    """The groups with those of norms whose channels can only go together: behind layers whose channels do.

    Under a budget layers and their norms are of one group, as what one of them keeps stays.
    """
    if not norms:
        return list(groups)
    found = dependencies(traced, layers_of(traced), obstacles=False)
    behind = {parameter: name for name, parameters in found.followers.items() for parameter in parameters}
    together: dict[Group, list[str]] = {}
    for norm in norms:
        layers = next((each for each in found.groups if behind.get(f"{norm}.weight") in each.modules), None)
        if layers is not None:
            own = next((each for each in groups if set(each.modules) <= set(layers.modules)), None)
            shares = own is not None and "budget" in settings[norm]
            together.setdefault(own if own is not None and shares else layers, []).append(norm)
    grown = [replace(group, modules=(*group.modules, *together.pop(group, ()))) for group in groups]
    return [*grown, *(Group(tuple(names), group.blocks, group.unit) for group, names in together.items())]


def _selected(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]]
) -> tuple[tuple[PruneEntry, ...], list[list[str]]]:
    entries = parse_config_list("pruner", config_list)
    resolve(model, "pruner", entries, "config_list")
    return entries, [select(model, entry, f"config_list[{index}]") for index, entry in enumerate(entries)]


def _has_channels(model: nn.Module, name: str) -> bool:
    weight = getattr(model.get_submodule(name), "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def _is_grouped_here(entry: PruneEntry, default: Granularity = "out_channel") -> bool:
    if entry.target_names is not None and "weight" not in entry.target_names:
        return False
    settings = entry.settings_for("weight")
    granularity = default if settings.granularity == "default" else settings.granularity
    whole = granularity == "out_channel" or _is_of_whole_channels(granularity)
    return settings.dependency_group_id is None and settings.align is None and whole


def _is_of_whole_channels(granularity: Granularity) -> bool:
    """Whether blocks are runs of channels, with all that is in them: only such masks can be shared."""
    return not isinstance(granularity, str) and len(granularity) > 1 and all(size == -1 for size in granularity[1:])


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _SELECTION}


def _numbered(groups: Sequence[Group], settings: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The id of each module that needs one: members of a group with equal settings."""
    numbers: dict[str, str] = {}
    for group in groups:
        kinds = [settings[name] for name in group.modules]
        if len(group.modules) > 1 and any(kind != kinds[0] for kind in kinds):
            names = ", ".join(group.modules)
            warnings.warn(
                f"{names}: their channels can only go together, and the config list prunes them differently: what one "
                "of them keeps stays in all",
                stacklevel=3,
            )
        elif len(group.modules) > 1 or group.blocks > 1:
            for name in group.modules:
                numbers[name] = f"channels of {group.modules[0]}"
    return numbers


def _by_group(
    model: nn.Module, entry: dict[str, Any], names: Sequence[str], groups: Sequence[Group], numbers: Mapping[str, str]
) -> ConfigList:
    """One entry for each group, and one for the rest."""
    rest = _settings(entry)
    parts: dict[tuple[str | None, int, tuple[int, ...]], list[str]] = {}
    for name in names:
        group = next((each for each in groups if name in each.modules), Group((name,)))
        blocks = group.blocks if name in numbers else 1
        parts.setdefault((numbers.get(name), blocks, _runs(model, name, group, rest)), []).append(name)
    result = []
    for (number, blocks, runs), members in parts.items():
        part = {**rest, "op_names": members}
        if number is not None:
            part["dependency_group_id"] = number
        if blocks > 1:
            part["internal_metric_block"] = blocks
        if runs:
            targets = dict(part.get("target_settings", {}))
            targets["weight"] = {**targets.get("weight", {}), "granularity": list(runs)}
            part["target_settings"] = targets
        result.append(part)
    return result


def _runs(model: nn.Module, name: str, group: Group, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The granularity that keeps runs of channels together, where there are any and the entry doesn't say its own."""
    own = settings.get("target_settings", {}).get("weight", {}).get("granularity")
    if group.unit == 1 or (own or settings.get("granularity", "default")) != "default":
        return ()
    layout = layout_of(model, TargetId(name, "weight"))
    assert layout.shape is not None and layout.channel_dim is not None
    runs = [-1] * len(layout.shape)
    runs[layout.channel_dim] = group.unit
    if layout.groups > 1:
        # Over dimension 0 a block is what one group has of it; longer runs than a group can't be said in blocks.
        runs[0] = layout.shape[0] // layout.groups
        return tuple(runs) if layout.shape[1] % group.unit == 0 else ()
    return tuple(runs)


def align_followers(model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Example) -> ConfigList:
    """The config list with entries for what follows the pruned layers.

    The biases of pruned layers, and weights and biases of norms behind them, are masked with the layers' output
    channels, so that a pruned channel is exactly zero. What the config list sets itself stays as it is.

    Args:
        model: the model.
        config_list: a pruner's config list.
        dummy_input: an example input.

    Returns:
        A new config list: the given entries, then one entry with `align` for every module that follows.

    Raises:
        ConfigError: the config list is wrong.
        SpeedupError: the model can't be traced.
    """
    return _with_followers(TracedModel.of(model, dummy_input), config_list)


def _with_followers(traced: TracedModel, config_list: Sequence[Mapping[str, Any]]) -> ConfigList:
    model = traced.model
    entries, selected = _selected(model, config_list)
    result = [dict(entry) for entry in config_list]
    taken = set[int]()  # by identity: a tied parameter has several names
    names = []
    for entry, own in zip(entries, selected, strict=True):
        for name in own:
            module = model.get_submodule(name)
            targets = tuple(entry.target_names or default_targets("pruner", type_name(module)))
            taken.update(id(getattr(module, target, None)) for target in targets)
            if "weight" in targets and _has_channels(model, name):
                names.append(name)
    if not names:
        return result
    groups = {
        name: entry.settings_for("weight").dependency_group_id
        for entry, own in zip(entries, selected, strict=True)
        for name in own
    }
    found = dependencies(traced, names, groups, obstacles=False)
    for name, parameters in found.followers.items():
        by_module: dict[str, list[str]] = {}
        for parameter in parameters:
            owner, _, target = parameter.rpartition(".")
            if id(getattr(model.get_submodule(owner), target)) not in taken:
                by_module.setdefault(owner, []).append(target)
        for owner, own_targets in by_module.items():
            align: dict[str, Any] = {"module_name": name, "target_name": "weight"}
            result.append({"op_names": [owner], "target_names": own_targets, "align": align})
    return result


def obstacles(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], dummy_input: Example
) -> dict[tuple[str, ...], str]:
    """The layers that a pruner's config list names and exact speedup can never make smaller, and why; those that go
    together in one. Errors as in `align_followers`."""
    entries, selected = _selected(model, config_list)
    applied = [entry.settings_for("weight").apply_method != "bypass" and _is_grouped_here(entry) for entry in entries]
    grouped = [name for is_applied, own in zip(applied, selected, strict=True) for name in own if is_applied]
    names = [name for name in grouped if _has_channels(model, name)]
    groups = dependencies(TracedModel.of(model, dummy_input), names).groups if names else ()
    return {group.modules: group.obstacle for group in groups if group.obstacle is not None}
