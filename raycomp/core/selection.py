"""From config-list entries to targets: which modules an entry selects, and which of their targets it sets.

Selection is `((op_names ∪ op_names_re) ∩ op_types) − (exclude_op_names ∪ exclude_op_names_re ∪ exclude_op_types)`.
Patterns match from the beginning of a name, as NNI's do: "layer1" means everything below layer1, "layer1$" it alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.utils import parametrize

from raycomp.config import DistillTarget, PruneTarget, QuantizeTarget, SelectionEntry, nearest
from raycomp.config.entries import DistillEntry, Entry, PruneEntry, QuantizeEntry, canonical_target
from raycomp.core.attach import forward_arguments, is_own_parameter, original_parameter, user_class
from raycomp.core.channels import followed_channels
from raycomp.core.coupling import Coupling
from raycomp.core.layout import Layout, layouts
from raycomp.core.target import TargetId, target_kind
from raycomp.errors import ConfigError, Problem

Kind = Literal["pruner", "quantizer", "distiller"]
TargetSettings = PruneTarget | QuantizeTarget | DistillTarget

_CONVOLUTIONS = tuple(f"Conv{transpose}{dim}d" for transpose in ("", "Transpose") for dim in (1, 2, 3))
_TEMPLATES: dict[Kind, dict[str, tuple[str, ...]]] = {
    "pruner": {
        **dict.fromkeys(("Linear", *_CONVOLUTIONS), ("weight", "bias")),
        **{f"BatchNorm{dim}d": ("weight", "bias") for dim in (1, 2, 3)},
        "Embedding": ("weight",),
    },
    "quantizer": {
        **dict.fromkeys(("Linear", *_CONVOLUTIONS), ("_input_0", "weight", "bias", "_output_0")),
        **{f"BatchNorm{dim}d": ("_input_0", "weight", "bias", "_output_0") for dim in (1, 2)},
        **dict.fromkeys(("ReLU", "ReLU6", "Hardtanh", "MaxPool2d"), ("_input_0", "_output_0")),
    },
    "distiller": {},
}


def register_template(kind: Kind, class_name: str, targets: Sequence[str]) -> None:
    """Says which targets a config entry means by default in modules of a user's class.

    Raises:
        ValueError: the class has a template already.
    """
    if class_name in _TEMPLATES[kind]:
        raise ValueError(f"{class_name} already has a {kind} template: {_TEMPLATES[kind][class_name]}")
    _TEMPLATES[kind][class_name] = tuple(canonical_target(target) for target in targets)


def default_targets(kind: Kind, class_name: str) -> tuple[str, ...]:
    """The targets that an entry without `target_names` means."""
    return ("_output_0",) if kind == "distiller" else _TEMPLATES[kind].get(class_name, ())


def type_name(module: nn.Module) -> str:
    """The name of the module's class as the user wrote it, below what compression put on top."""
    return user_class(module).__name__


def module_names(model: nn.Module) -> dict[str, str]:
    """Name → class name of every module that the user put into the model."""
    found = {}
    for name, module in model.named_modules():
        if "parametrizations" not in name.split(".") and "raycomp_targets" not in name.split("."):
            found[name] = type_name(module)
    return found


@dataclass(frozen=True)
class Selected:
    """One selected target.

    Args:
        target_id: the target.
        settings: the entry's settings for it.
        where: the entry's place in the config list, for messages.
        own_keys: the keys that the entry gives in `target_settings` for this very target.
    """

    target_id: TargetId
    settings: TargetSettings
    where: str
    own_keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Selection:
    """A config list resolved against a model: what a compressor is built from, the same in every process.

    Args:
        entries: the config list.
        selected: every target that it sets, in the order of the entries.
        layouts: the shape of each, and where its channels are.
        coupling: what goes with each channel, where a pruner asks for it.
    """

    entries: tuple[SelectionEntry, ...]
    selected: Mapping[TargetId, Selected]
    layouts: Mapping[TargetId, Layout]
    coupling: Coupling | None = None


def resolve(
    model: nn.Module, kind: Kind, entries: Sequence[SelectionEntry], where: str, example: Any = None
) -> Selection:
    """Every target that a config list sets.

    Args:
        model: the model.
        kind: of the compressor.
        entries: the config list.
        where: its place, for messages.
        example: an example input of the model, which tells the shapes of inputs and outputs; None for none.

    Raises:
        ConfigError: with all that is wrong: a name or type that the model lacks, an entry that selects nothing, a
            target that a module lacks, a target set twice.
    """
    problems: list[Problem] = []
    selected: dict[TargetId, Selected] = {}
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        names = _select(model, entry, place, problems)
        known = len(problems)
        found = [target for name in names for target in _targets(model, kind, name, entry, place, problems)]
        if names and not found and len(problems) == known:
            problems.append(_no_targets(model, kind, names, place))
        for target in found:
            if target.target_id in selected:
                earlier = selected[target.target_id].where
                problems.append(Problem(place, f"{target.target_id} is set already by {earlier}", "exclude it in one"))
            selected[target.target_id] = target
    problems += _tied_problems(model, selected.values())
    if problems:
        raise ConfigError(problems)
    placed = layouts(model, selected, example)
    if example is not None:
        settings = {target_id: item.settings for target_id, item in selected.items()}
        placed |= followed_channels(model, settings, placed, example)
    return Selection(tuple(entries), selected, placed)


def select(model: nn.Module, entry: SelectionEntry, where: str) -> list[str]:
    """The names of the modules that one entry selects, in the model's order.

    Raises:
        ConfigError: a key that matches nothing.
    """
    problems: list[Problem] = []
    names = _select(model, entry, where, problems)
    if problems:
        raise ConfigError(problems)
    return names


def _select(model: nn.Module, entry: SelectionEntry, where: str, problems: list[Problem]) -> list[str]:
    types = module_names(model)
    known = len(problems)
    for key in ("op_names", "exclude_op_names"):
        for name in getattr(entry, key):
            if name not in types:
                problems.append(Problem(f"{where}.{key}", *_unknown_module(model, name, types)))
    classes = sorted(set(types.values()))
    for key in ("op_types", "exclude_op_types"):
        for name in getattr(entry, key):
            if name not in classes:
                problems.append(Problem(f"{where}.{key}", f"no module is of type {name!r}", nearest(name, classes)))
    for key in ("op_names_re", "exclude_op_names_re"):
        for pattern in getattr(entry, key):
            if not any(re.match(pattern, name) for name in types):
                remedy = "the pattern must match a module's name from its beginning"
                problems.append(Problem(f"{where}.{key}", f"{pattern!r} matches no module", remedy))
    if len(problems) > known:
        return []
    chosen = [name for name in types if _chosen(name, types[name], entry)]
    if not chosen:
        problems.append(Problem(where, "the entry selects no module", "its keys exclude one another for this model"))
    return chosen


def _chosen(name: str, kind: str, entry: SelectionEntry) -> bool:
    named = name in entry.op_names or any(re.match(pattern, name) for pattern in entry.op_names_re)
    if (entry.op_names or entry.op_names_re) and not named:
        return False
    if entry.op_types and kind not in entry.op_types:
        return False
    excluded = name in entry.exclude_op_names or kind in entry.exclude_op_types
    return not excluded and not any(re.match(pattern, name) for pattern in entry.exclude_op_names_re)


def _targets(
    model: nn.Module, kind: Kind, name: str, entry: SelectionEntry, where: str, problems: list[Problem]
) -> list[Selected]:
    module = model.get_submodule(name)
    found = []
    for target in entry.target_names or default_targets(kind, type_name(module)):
        if target_kind(target) == "parameter" and not is_own_parameter(module, target):
            unfit = _parameter_problem(module, target)
            if unfit is not None:
                message = f"{name or 'the model'} ({type_name(module)}) {unfit[0]}"
                problems.append(Problem(f"{where}.target_names", message, unfit[1]))
            continue
        if target_kind(target) == "input" and (problem := _argument_problem(module, target)):
            problems.append(Problem(f"{where}.target_names", f"{name} ({type_name(module)}): {problem[0]}", problem[1]))
            continue
        assert isinstance(entry, PruneEntry | QuantizeEntry | DistillEntry)
        found.append(Selected(TargetId(name, target), entry.settings_for(target), where, _own_keys(entry, target)))
    return found


def _unknown_module(model: nn.Module, name: str, known: Mapping[str, str]) -> tuple[str, str]:
    """Message and remedy for a name that is not among the modules' first names."""
    shared = dict(model.named_modules(remove_duplicate=False)).get(name)
    first = next((own for own, module in model.named_modules() if module is shared), None)
    if shared is not None and first is not None and first in known:
        return f"{name!r} is the same module as {first!r}", f"name {first!r}"
    return f"the model has no module {name!r}", nearest(name, known)


def _argument_problem(module: nn.Module, target: str) -> tuple[str, str] | None:
    """What is wrong with an input target that names no argument of the module's forward."""
    key = target.removeprefix("_input_")
    names, takes_any = forward_arguments(module)
    if key.isdigit() or key in names or takes_any:
        return None
    return f"forward has no argument {key!r}", nearest(key, names)


def _tied_problems(model: nn.Module, selected: Iterable[Selected]) -> list[Problem]:
    """Targets that are one and the same Parameter: what one compressor does to it, it does once."""
    first: dict[int, TargetId] = {}
    problems = []
    for item in selected:
        if target_kind(item.target_id.target) != "parameter":
            continue
        parameter = original_parameter(model.get_submodule(item.target_id.module), item.target_id.target)
        earlier = first.setdefault(id(parameter), item.target_id)
        if earlier != item.target_id:
            message = f"{item.target_id} and {earlier} are one tied parameter"
            problems.append(Problem(item.where, message, "exclude one of them; the other holds for both"))
    return problems


def _own_keys(entry: Entry, target: str) -> frozenset[str]:
    own = entry.target_settings.get(target)
    return frozenset(own.model_fields_set if own is not None else ())


def _parameter_problem(module: nn.Module, name: str) -> tuple[str, str] | None:
    """Message and remedy for a name that is no Parameter of the module's; None where the module does without (a bias).

    A weight that is computed from others (weight norm, spectral norm, a property) is none: nothing can be set in it.
    """
    own = [key for key, _ in module.named_parameters(recurse=False)]
    if not hasattr(module, name):
        return f"has no parameter {name!r}", nearest(name, own)
    if getattr(module, name) is None:
        return None
    chain = module.parametrizations[name] if parametrize.is_parametrized(module, name) else None  # type: ignore[index]
    if chain is not None:
        by = ", ".join(type(each).__name__.strip("_") for each in chain)  # type: ignore[union-attr]
        remedy = "take it off before (torch.nn.utils.parametrize.remove_parametrizations), or exclude the module"
        return f"computes its {name!r} by the parametrization {by}", remedy
    remedy = "take that off before (remove_weight_norm, remove_spectral_norm), or exclude the module"
    return f"computes its {name!r} in each forward pass, from {', '.join(own) or 'other modules'}", remedy


def _no_targets(model: nn.Module, kind: Kind, names: list[str], where: str) -> Problem:
    types = sorted({type_name(model.get_submodule(name)) for name in names})
    message = f"{', '.join(types)} has no {kind} targets by default"
    return Problem(where, message, "name them with target_names, or raycomp.register_template for the class")
