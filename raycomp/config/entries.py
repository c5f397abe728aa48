"""Config-list entries: which modules a compressor takes, and what it does to each of their targets.

The library and the job files share them; `parse_config_list` is the library's way in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_serializer

from raycomp.config import nni
from raycomp.config.base import Conflict, Given, Settings
from raycomp.config.values import (
    CountOrZero,
    Items,
    KeyPath,
    NonNegative,
    Number,
    Positive,
    SomeItems,
    Text,
    expects,
    refuse,
)


def canonical_target(name: str) -> str:
    """`_input_` and `_output_` are short for the first input and output."""
    return f"{name}0" if name in ("_input_", "_output_") else name


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise refuse(f"'{pattern}' is not a regular expression: {error}") from None
    return pattern


def _block_size(size: int) -> int:
    if size == -1 or size >= 1:
        return size
    raise ValueError("a block size is -1 or at least 1")


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice")
    return names


def _numbers_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_GroupId = Annotated[Text, BeforeValidator(_numbers_as_text)]
_Name = Annotated[str, Field(min_length=1), expects("a name")]
_TargetName = Annotated[_Name, AfterValidator(canonical_target)]
_Pattern = Annotated[_Name, AfterValidator(_compiles)]
_Ratio = Annotated[float, Field(ge=0, lt=1), expects("a number, at least 0 and below 1")]
Blocks = SomeItems[Annotated[int, AfterValidator(_block_size)]]
_PaddedBlocks = Annotated[
    tuple[Blocks, Literal["front", "back"], int],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
GranularityName = Literal["default", "out_channel", "in_channel", "per_channel"]
Granularity = Annotated[
    GranularityName | Blocks | _PaddedBlocks,
    expects(
        "'default', 'out_channel', 'in_channel', 'per_channel', a list of block sizes (-1: the whole dimension), "
        "or [[block sizes], 'front' or 'back', padding value]"
    ),
]
_Dtype = Annotated[
    str, Field(pattern=r"^u?int([2-9]|1[0-6])$"), expects("'int2' to 'int16' or 'uint2' to 'uint16', such as 'int8'")
]
_Fused = Annotated[
    Items[_Name], Field(min_length=2, max_length=3), AfterValidator(_distinct), expects("2 or 3 different module names")
]
_Links = Annotated[
    Text | SomeItems[Text],
    expects("'auto', the name of a module of the teacher, or a list of such names"),
]


class _SaysWhatWasGiven(Settings):
    """Settings in which a key that was given means more than its default: only such keys are written out."""

    def given_values(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.model_fields_set}

    @model_serializer(mode="wrap")
    def _only_given(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        fields = type(self).model_fields
        given = self.model_fields_set | {fields[name].alias or name for name in self.model_fields_set}
        return {key: value for key, value in handler(self).items() if key in given}


class Align(Settings):
    """The mask follows another target's mask: kept where the source, summed over its other dims, is above 0."""

    module_name: Text | None = None
    """The module that holds the source (null: the same module)."""
    target_name: _TargetName = "weight"
    """The source among that module's targets."""
    dims: SomeItems[CountOrZero] | None = None
    """The source's dimensions that the mask follows (null: its output channels)."""


_Amount = Annotated[float, Field(gt=0), expects("a part of what the model has now (up to 1), or a number above 1")]


class Budget(Settings):
    """What the whole model may cost behind speedup: each of these that is given holds."""

    macs: _Amount | None = None
    """Multiply-accumulates of one sample: 0.5 is half of what the model has, 1000000 a million."""
    parameters: _Amount | None = None
    """Parameters: 0.5 is half of what the model has, 1000000 a million."""
    latency: Annotated[float, Field(gt=0, lt=1), expects("a number between 0 and 1")] | None = None
    """Seconds of a call with `evaluation.latency_batch_size` samples, as a part of what the model takes; a job measures
    them where it measures its result."""
    latency_ms: Positive | None = None
    """The same in milliseconds."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if not any(given.has(name) for name in cls.model_fields):
            yield Conflict(
                (), "it says of nothing how much may stay", "add macs, parameters or latency: 0.5 for half of it"
            )
        if given.has("latency") and given.has("latency_ms"):
            yield Conflict(("latency_ms",), "latency and latency_ms exclude each other", "leave one of them out")

    def limits(self) -> dict[str, float]:
        """What is given of what the graph can tell, by name."""
        return {name: value for name in ("macs", "parameters") if (value := getattr(self, name)) is not None}

    @property
    def is_timed(self) -> bool:
        """Whether a latency is given, which only measuring can tell."""
        return self.latency is not None or self.latency_ms is not None

    def by_macs(self, part: float) -> Budget:
        """The budget with a part of the multiply-accumulates in place of the latency."""
        macs = part if self.macs is None else min(self.macs, part)
        return Budget(macs=macs, parameters=self.parameters)


class PruneTarget(_SaysWhatWasGiven):
    """How a pruner treats one target."""

    older_keys: ClassVar[Mapping[str, str]] = nni.PRUNING_KEYS
    sparse_ratio: _Ratio | None = None
    """The fraction to prune: the blocks with the smallest metrics."""
    sparse_threshold: Number | None = None
    """Keep where the metric is at least this; excludes sparse_ratio."""
    budget: Budget | None = None
    """What the model may cost; excludes sparse_ratio. The same ratio everywhere, or by rank with a global_group_id."""
    min_sparse_ratio: _Ratio | None = None
    """At least this fraction of the target is pruned."""
    max_sparse_ratio: Annotated[float, Field(ge=0, le=1), expects("a number from 0 to 1")] | None = None
    """At most this fraction of the target is pruned (null: all but one block; 1: all of it, too)."""
    global_group_id: _GroupId | None = None
    """Targets with the same id are ranked together."""
    dependency_group_id: _GroupId | None = None
    """Targets with the same id share one mask."""
    internal_metric_block: Annotated[int, Field(ge=1), expects("a whole number, at least 1")] | None = None
    """The same count is pruned in each of this many blocks of a dependency group."""
    granularity: Granularity = "default"
    """What is pruned together."""
    align: Align | None = None
    """Follow another target's mask."""
    apply_method: Annotated[Literal["mul", "add", "bypass"], expects("'mul', 'add' or 'bypass'")] = "mul"
    """mul: zero where masked; add: -1000 where masked; bypass: leave as it is."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        goals = [goal for goal in ("sparse_ratio", "sparse_threshold", "budget") if given.has(goal)]
        for other in goals[1:]:
            yield Conflict((other,), f"{goals[0]} and {other} exclude each other", "leave one of them out")
        least, most = given.number("min_sparse_ratio"), given.number("max_sparse_ratio")
        if least is not None and most is not None and least > most:
            yield Conflict(
                ("min_sparse_ratio",), f"{least} is above max_sparse_ratio, {most}", f"should be at most {most}"
            )


class QuantizeTarget(_SaysWhatWasGiven):
    """How a quantizer treats one target."""

    older_keys: ClassVar[Mapping[str, str]] = nni.QUANTIZING_KEYS
    quant_dtype: _Dtype = "int8"
    """The integer type."""
    quant_scheme: Annotated[Literal["symmetric", "affine"], expects("'symmetric' or 'affine'")] = "symmetric"
    """Whether the range is symmetric around 0."""
    granularity: Granularity = "default"
    """What shares one scale (default: the whole tensor)."""
    apply_method: Annotated[
        Literal["clamp_round", "qat_clamp_round", "bypass"], expects("'clamp_round', 'qat_clamp_round' or 'bypass'")
    ] = "clamp_round"
    """How values are quantized in training."""


class DistillTarget(_SaysWhatWasGiven):
    """How a distiller treats one target."""

    lambda_: NonNegative = Field(default=1.0, alias="lambda")
    """The weight of this target's loss."""
    link: _Links = "auto"
    """The teacher's modules that it is held against (auto: the one of the same name)."""
    apply_method: Annotated[Literal["mse", "kl"], expects("'mse' or 'kl'")] = "mse"
    """The loss; kl with temperature 2."""


class SelectionEntry(_SaysWhatWasGiven):
    """The keys that select modules: ((op_names or op_names_re) and op_types) without what is excluded."""

    target_class: ClassVar[type[Settings]]
    older_keys: ClassVar[Mapping[str, str]] = nni.SELECTING_KEYS
    least: ClassVar[str] = "add op_types, op_names or op_names_re"
    """What to write into an entry that is empty."""

    op_types: Items[_Name] = ()
    """Class names of modules, exact."""
    op_names: Items[_Name] = ()
    """Names of modules, as in named_modules()."""
    op_names_re: Items[_Pattern] = ()
    """Regular expressions for the names of modules."""
    exclude_op_types: Items[_Name] = ()
    """Class names to leave out."""
    exclude_op_names: Items[_Name] = ()
    """Names to leave out."""
    exclude_op_names_re: Items[_Pattern] = ()
    """Regular expressions for names to leave out."""
    target_names: SomeItems[_TargetName] | None = None
    """The targets to take (null: all that the module's class has by default)."""

    def _given_for(self, target_name: str) -> dict[str, Any]:
        shortcuts = self.model_fields_set & self.target_class.model_fields.keys()
        given = {key: getattr(self, key) for key in shortcuts}
        own = self._target_settings().get(canonical_target(target_name))
        return given | ({key: getattr(own, key) for key in own.model_fields_set} if own else {})

    def _target_settings(self) -> Mapping[str, Settings]:
        raise NotImplementedError

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        keys = ("op_types", "op_names", "op_names_re")
        if not given.values:
            yield Conflict((), "it is empty", cls.least)
        elif not any(given.values.get(key) for key in keys) and not cls.may_mean(given, keys):
            yield Conflict((), "it selects no module", "add op_types, op_names or op_names_re")
        yield from _target_conflicts(cls.target_class, given)


def _target_conflicts(target_class: type[Settings], given: Given) -> Iterator[Conflict]:
    """What goes wrong between the top level of an entry and its target_settings."""
    chosen = {canonical_target(name) for name in given.sequence("target_names") if isinstance(name, str)}
    shortcuts = {key: value for key, value in given.values.items() if key in target_class.key_names()}
    alone = list(target_class.conflicts(Given(shortcuts)))
    seen = set()
    for name, own in given.child("target_settings").values.items():
        where: KeyPath = ("target_settings", name)
        target = canonical_target(str(name))
        if target in seen:
            yield Conflict(where, f"'{target}' has settings twice", "merge them")
        seen.add(target)
        if chosen and target not in chosen:
            yield Conflict(where, f"'{name}' is not among target_names", "add it there, or leave its settings out")
        known = alone + list(target_class.conflicts(Given(own)))
        for conflict in target_class.conflicts(Given(shortcuts | dict(Given(own).values))):
            if conflict not in known:
                yield Conflict(where, f"with the entry's other keys, {conflict.message}", conflict.remedy)


def _towards(settings: PruneTarget, share: float) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if settings.sparse_ratio is not None:
        changed["sparse_ratio"] = 1 - (1 - settings.sparse_ratio) ** share
    if settings.budget is not None:
        changed["budget"] = Budget(**{name: part**share for name, part in settings.budget.limits().items()})
    return changed


class PruneEntry(PruneTarget, SelectionEntry):
    """One entry of a pruner's config list."""

    target_class: ClassVar[type[Settings]] = PruneTarget
    least: ClassVar[str] = "add op_types, op_names or op_names_re, and sparse_ratio, sparse_threshold or align"
    older_keys: ClassVar[Mapping[str, str]] = {**nni.SELECTING_KEYS, **nni.PRUNING_KEYS}
    target_settings: dict[_TargetName, PruneTarget] = Field(default_factory=dict)
    """Settings for single targets, over those of the entry."""

    def settings_for(self, target_name: str) -> PruneTarget:
        """The settings of one target: those of the entry, under those of the target alone."""
        return PruneTarget(**self._given_for(target_name))

    def towards(self, share: float) -> Self:
        """The entry with the goals that come after a share of the way, the same part of what is left being pruned each
        time: 1 − (1 − goal) ** share."""
        own = {name: target.model_copy(update=_towards(target, share)) for name, target in self.target_settings.items()}
        return self.model_copy(update={**_towards(self, share), **({"target_settings": own} if own else {})})

    def _target_settings(self) -> Mapping[str, Settings]:
        return self.target_settings

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        levels = [given, *map(Given, given.child("target_settings").values.values())]
        goals = ("sparse_ratio", "sparse_threshold", "budget", "align", "min_sparse_ratio")
        bypassed = all(level.text("apply_method") == "bypass" for level in levels)
        # NNI once had entries that only exclude: they need no goal to be told what they should be.
        said = "exclude" in given.values or any(level.has(goal) for level in levels for goal in goals)
        if given.values and not bypassed and not said and not any(cls.may_mean(level, goals) for level in levels):
            remedy = "add sparse_ratio, sparse_threshold, budget or align"
            yield Conflict((), "it does not say how much to prune", remedy)


class QuantizeEntry(QuantizeTarget, SelectionEntry):
    """One entry of a quantizer's config list."""

    target_class: ClassVar[type[Settings]] = QuantizeTarget
    older_keys: ClassVar[Mapping[str, str]] = {**nni.SELECTING_KEYS, **nni.QUANTIZING_KEYS}
    target_settings: dict[_TargetName, QuantizeTarget] = Field(default_factory=dict)
    """Settings for single targets, over those of the entry."""
    fuse_names: Items[_Fused] = ()
    """Modules that compute as one: Conv/Linear+BN(+ReLU), Conv/Linear+ReLU, BN+ReLU; the first hosts the rest."""

    def settings_for(self, target_name: str) -> QuantizeTarget:
        """The settings of one target: those of the entry, under those of the target alone."""
        return QuantizeTarget(**self._given_for(target_name))

    def _target_settings(self) -> Mapping[str, Settings]:
        return self.target_settings


class DistillEntry(DistillTarget, SelectionEntry):
    """One entry of a distiller's config list."""

    target_class: ClassVar[type[Settings]] = DistillTarget
    target_settings: dict[_TargetName, DistillTarget] = Field(default_factory=dict)
    """Settings for single targets, over those of the entry."""

    def settings_for(self, target_name: str) -> DistillTarget:
        """The settings of one target: those of the entry, under those of the target alone."""
        return DistillTarget(**self._given_for(target_name))

    def _target_settings(self) -> Mapping[str, Settings]:
        return self.target_settings


Entry = PruneEntry | QuantizeEntry | DistillEntry
