"""What a job says, from its task to its cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Literal

import yaml
from pydantic import Field, JsonValue

from raycomp.config.base import Conflict, Given, Settings
from raycomp.config.compressors import CompressorConfig
from raycomp.config.dialect import JobDumper
from raycomp.config.registry import COMPRESSORS
from raycomp.config.storage import StorageConfig
from raycomp.config.training import TrainingConfig, TrainingOverrides, accumulation_conflicts
from raycomp.config.values import (
    Count,
    Flag,
    Json,
    NonNegative,
    Positive,
    Processes,
    Slug,
    SomeItems,
    Text,
    at_most,
    expects,
)

_AutoFlag = Annotated[Literal["auto"] | bool, expects("'auto', true or false")]
_EntryPoint = Annotated[
    str,
    Field(pattern=r"^([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:\x00-\x1f\x7f-\x9f]+\.py):[A-Za-z_]\w*$"),
    expects("'package.module:Class' or 'path/to/file.py:Class'"),
]


_HOW_IT_RUNS = {"num_data_workers", "checkpoint_every_epochs"}


class TaskConfig(Settings):
    """Where the user's task is, and what it is built with."""

    entrypoint: _EntryPoint
    """'package.module:Class', or 'path/to/file.py:Class' relative to the job file."""
    arguments: dict[str, Json] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    object_digest: Text | None = None
    """The sha256 of what the task holds, where Python gave a task that is already made."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.has("object_digest") and given.values.get("arguments"):
            remedy = "leave them out, or give its class, which is called with them"
            yield Conflict(("arguments",), "the task that was given is already made", remedy)


class StageConfig(Settings):
    """One training run with the compressors that it fuses."""

    name: Slug
    """What the stage is called in progress, checkpoints and the report."""
    compressors: SomeItems[CompressorConfig]
    """The compressors, from the innermost to the outermost."""
    training: TrainingOverrides | None = None
    """What this stage trains differently."""
    speedup: Flag = True
    """Whether what the stage pruned is cut out of the model after it."""


class ScalingConfig(Settings):
    """On how many workers, and with what for each."""

    num_workers: Processes = 1
    """Processes that train."""
    resources_per_worker: dict[Text, NonNegative] = Field(default_factory=lambda: {"CPU": 1.0})
    """What Ray reserves for a worker."""
    use_gpu: _AutoFlag = "auto"
    """Whether workers train on a GPU (auto: when the cluster has enough of them)."""
    threads_per_worker: Annotated[Processes, at_most(1024)] = 1
    """Threads that a worker's CPU operations use."""
    max_failures: Annotated[int, Field(ge=-1), expects("a whole number, at least 0; or -1 for any number")] = 3
    """How often lost workers are replaced before the job gives up."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.values.get("use_gpu") is False and given.child("resources_per_worker").number("GPU"):
            yield Conflict(
                ("resources_per_worker", "GPU"), "it asks for GPUs, and use_gpu is false", "leave one of them out"
            )


class SpeedupConfig(Settings):
    """How pruned channels are cut out of the model."""

    enabled: Flag = True
    """Whether they are at all."""
    exact: Flag = True
    """Whether only what leaves the outputs as they are is cut."""
    align: Flag = True
    """Whether norms and biases follow the masks of the layer before them."""
    dependency_groups: Flag = True
    """Whether channels that can only go together share one mask."""
    tolerance: Positive = 1e-4
    """Greatest difference of outputs, relative to their range, that passes verification."""


class Int8Config(Settings):
    """The integer model that is made of what a quantizer learned."""

    enabled: _AutoFlag = "auto"
    """Whether to make one (auto: when any stage has a quantizer)."""
    reduce_range: _AutoFlag = "auto"
    """Whether weights keep to 7 bits, for processors whose 8-bit products overflow (auto: by this processor)."""


class EvaluationConfig(Settings):
    """How models are measured."""

    batch_size: Count = 256
    """Samples per batch for the metrics."""
    max_samples: Count | None = None
    """Measure on the first of the evaluation data only (null: on all)."""
    limit_s: Positive = 600.0
    """Seconds after which the finished forms are measured no further: their metrics are of the samples up to there."""
    latency_batch_size: Count = 32
    """The batch whose latency is measured beside that of one sample."""
    latency_runs: Count = 50
    """Runs, of which the median counts."""


class ClusterConfig(Settings):
    """Where Ray is."""

    address: Text | None = None
    """The cluster's address (null: RAY_ADDRESS if set, else a local Ray that the job starts itself)."""
    num_cpus: Processes | None = None
    """CPUs of the local Ray (null: all; more than there are is taken as meant)."""
    wait_s: NonNegative | None = None
    """Seconds that a cluster gets to grow to what the workers need (null: 600 where it has an autoscaler, else 0)."""
    send_credentials: Flag = True
    """Whether the keys of s3:// storage go to the cluster; false where a role or a mounted file of its nodes serves."""


class JobConfig(Settings):
    """A whole job: a task, and the stages that compress its model."""

    name: Slug
    """The job's folder in storage."""
    task: TaskConfig
    """The user's model, data and training step."""
    stages: SomeItems[StageConfig]
    """What is done, in this order."""
    training: TrainingConfig
    """How stages train; it says at least epochs or steps."""
    scaling: ScalingConfig = Field(default_factory=ScalingConfig)
    """On how many workers, and with what for each."""
    storage: StorageConfig = Field(default_factory=StorageConfig)
    """Where artifacts and checkpoints go."""
    speedup: SpeedupConfig = Field(default_factory=SpeedupConfig)
    """How pruned channels are cut out of the model."""
    int8: Int8Config = Field(default_factory=Int8Config)
    """The integer model."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """How models are measured."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """Where Ray is."""

    def training_for(self, stage: StageConfig) -> TrainingConfig:
        """How a stage trains: the job's training with the stage's overrides."""
        return stage.training.over(self.training) if stage.training else self.training

    @property
    def wants_int8(self) -> bool:
        """Whether the job ends with an integer model."""
        if self.int8.enabled == "auto":
            return any(part.kind == "quantizer" for stage in self.stages for part in stage.compressors)
        return self.int8.enabled

    def to_yaml(self) -> str:
        """The job as a file that `load_job` reads back as an equal job, defaults written out."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=JobDumper, sort_keys=False, allow_unicode=True, width=120)

    def digest(self) -> str:
        """The sha256 of the job's content, in hex; the same for equal jobs."""
        return _sha256(self.model_dump(mode="json"))

    def result_digest(self) -> str:
        """As `digest`, of what decides the result: not of where the job runs, on what, and how often it saves."""
        stages = {"__all__": {"training": _HOW_IT_RUNS}}
        where = {"scaling": True, "cluster": True, "storage": True}
        return _sha256(self.model_dump(mode="json", exclude={**where, "training": _HOW_IT_RUNS, "stages": stages}))

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        yield from _turn_conflicts(given)
        yield from _budget_conflicts(given)
        training, seen = given.child("training").values, set[str]()
        fits = not list(accumulation_conflicts(Given(training)))
        for index, stage in enumerate(given.children("stages")):
            name = stage.text("name")
            if name in seen:
                yield Conflict(("stages", index, "name"), f"another stage is named '{name}', too", "names are unique")
            seen |= {name} if name else set()
            overrides = {key: value for key, value in stage.child("training").values.items() if value is not None}
            for conflict in accumulation_conflicts(Given({**training, **overrides})) if fits and overrides else ():
                yield Conflict(("stages", index, "training", *conflict.key), conflict.message, conflict.remedy)
        types = [part.text("type") for stage in given.children("stages") for part in stage.children("compressors")]
        kinds = {COMPRESSORS[name].kind if name in COMPRESSORS else "quantizer" for name in types if name}
        if given.child("int8").values.get("enabled") is True and "quantizer" not in kinds:
            yield Conflict(("int8", "enabled"), "no stage has a quantizer", "add one, or set it to 'auto'")


def _turn_conflicts(given: Given) -> Iterator[Conflict]:
    """A stage that prunes in turns becomes several: two kinds of turns in one can't."""
    for index, stage in enumerate(given.children("stages")):
        places = [
            place
            for place, each in enumerate(stage.children("compressors"))
            if each.text("type") == "AutoCompressPruner"
        ]
        for place in places[1:]:
            where = ("stages", index, "compressors", place)
            yield Conflict(where, "the stage prunes in turns already", "put it in a stage of its own")


def _budget_conflicts(given: Given) -> Iterator[Conflict]:
    """A budget is of what speedup leaves, which goes by the graph."""
    compressors = [each for stage in given.children("stages") for each in stage.children("compressors")]
    lists = [
        entry
        for each in compressors
        for holder in (each, each.child("pruner"))
        for entry in holder.children("config_list")
    ]
    if not any(entry.has("budget") for entry in lists):
        return
    for key in ("enabled", "align", "dependency_groups"):
        if given.child("speedup").values.get(key) is False:
            message = f"a budget is of what speedup leaves, and {key} is off"
            yield Conflict(("speedup", key), message, "leave it out, or give a sparse_ratio instead of the budget")


def _sha256(content: JsonValue) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
