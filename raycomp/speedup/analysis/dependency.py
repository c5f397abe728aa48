"""Which layers' channels can only go together, and what follows them: from the same atoms as the surgery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from raycomp.core.detached_copy import detached_copy
from raycomp.speedup.analysis.study import Group, Study, canonical_names
from raycomp.speedup.graph.example import Example
from raycomp.speedup.graph.graph import Graph
from raycomp.speedup.graph.trace import trace
from raycomp.speedup.rules import RULES
from raycomp.speedup.rules.base import Registry, tolerating


@dataclass(frozen=True)
class Dependencies:
    """What a model's graph says about the layers that shall be pruned.

    Args:
        groups: all of them, groups of one too.
        followers: for each layer, the full names of parameters (its own bias, norms after it, depthwise convolutions
            after it that aren't among the layers) that must be zero with its channels, so that these are zero.
    """

    groups: tuple[Group, ...]
    followers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class TracedModel:
    """A model without its compressors, and its graph: what several questions about dependencies share."""

    model: nn.Module
    graph: Graph
    example: Example

    @classmethod
    def of(cls, model: nn.Module, example_input: Example) -> TracedModel:
        """Traces a model.

        Raises:
            SpeedupError: it can't be traced.
        """
        detached = detached_copy(model)
        return cls(detached, trace(detached, example_input), example_input)


def dependencies(
    traced: TracedModel,
    module_names: Sequence[str],
    group_ids: Mapping[str, str | None] | None = None,
    *,
    obstacles: bool = True,
) -> Dependencies:
    """Groups, blocks, followers, and what can never be removed.

    Args:
        traced: the model.
        module_names: layers with a weight of two dimensions or more.
        group_ids: which layers share one mask (those of one id, apart from None); default: each group shares one.
            Where several layers are added before a norm, the norm follows them only if they share a mask.
        obstacles: whether to find out what can never be removed, which takes another run of the model.

    Raises:
        SpeedupError: a module is not there or has no such weight.
    """
    return tolerating(RULES, lambda rules: _dependencies(traced, module_names, group_ids, obstacles, rules))


def _dependencies(
    traced: TracedModel,
    module_names: Sequence[str],
    group_ids: Mapping[str, str | None] | None,
    obstacles: bool,
    rules: Registry,
) -> Dependencies:
    study = Study(traced.model, traced.graph, canonical_names(traced.model, module_names), rules)
    groups = study.groups()
    following = study.followers(groups, group_ids)
    reasons = study.obstacles(groups, following) if obstacles else [None] * len(groups)
    named = {canonical: name for name, canonical in zip(module_names, study.names, strict=True)}
    return Dependencies(
        tuple(
            Group(tuple(named[name] for name in group.modules), group.blocks, group.unit, obstacle)
            for group, obstacle in zip(groups, reasons, strict=True)
        ),
        {named[name]: tuple(parameters) for name, parameters in following.items()},
    )


def layers_of(traced: TracedModel) -> list[str]:
    """The names of all modules that have a weight with channels, and use it."""
    known = {value.tensor for value in traced.graph.state()}
    found = []
    for name, module in traced.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and (f"{name}.weight" if name else "weight") in known:
            found.append(name)
    return found
