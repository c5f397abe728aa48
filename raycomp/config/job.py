"""What a job says, from its task to its cluster."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import AfterValidator, Field, JsonValue

from raycomp.config.base import (
    Conflict,
    Count,
    CountOrZero,
    Flag,
    Given,
    NonNegative,
    Positive,
    Settings,
    Slug,
    SomeItems,
    Text,
    expects,
    nearest,
    refuse,
)
from raycomp.config.compressors import COMPRESSORS, CompressorConfig
from raycomp.config.dialect import JobDumper

_AutoFlag = Annotated[Literal["auto"] | bool, expects("'auto', true or false")]
_Precision = Annotated[Literal["float32", "bf16", "float64"], expects("'float32', 'bf16' or 'float64'")]
_EntryPoint = Annotated[
    str,
    Field(pattern=r"^([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:]+\.py):[A-Za-z_]\w*$"),
    expects("'package.module:Class' or 'path/to/file.py:Class'"),
]
_Json = Annotated[JsonValue, expects("plain data: texts, numbers, true, false, null, lists and mappings of these")]
_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs")
_S3_OPTIONS = ("endpoint_override", "scheme", "region")


def _storage_uri(uri: str) -> str:
    """Refuses what can't be a place, and secrets, which an error must not quote."""
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return uri
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "@" in parts.netloc or any(re.search("key|secret|token|password", option.lower()) for option in options):
        raise refuse(
            "the URI holds credentials", "take them out; they come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if scheme not in _SCHEMES:
        raise refuse(f"got '{uri}': there is no storage for '{scheme}://'", nearest(scheme, _SCHEMES))
    if scheme == "s3" and not parts.netloc:
        raise refuse(f"got '{uri}': it names no bucket", "should be s3://bucket/prefix")
    for option in options if scheme == "s3" else ():
        if option not in _S3_OPTIONS:
            raise refuse(f"got '{uri}': unknown option '{option}'", nearest(option, _S3_OPTIONS))
    return uri


def _endpoint(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if "@" in parts.netloc:
        raise refuse("the endpoint holds credentials", "take them out; they come from AWS_* environment variables")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise refuse(f"got '{endpoint}'", "should be http://host:port or https://host:port")
    return endpoint


class TaskConfig(Settings):
    """Where the user's task is, and what it is built with."""

    entrypoint: _EntryPoint
    """'package.module:Class', or 'path/to/file.py:Class' relative to the job file."""
    arguments: dict[str, _Json] = Field(default_factory=dict)
    """Keyword arguments of the class."""


class TrainingConfig(Settings):
    """How a stage trains."""

    global_batch_size: Count = 128
    """Samples of one optimizer step, over all workers."""
    epochs: Count | None = None
    """Passes over the training data; either this or steps."""
    steps: Count | None = None
    """Optimizer steps; either this or epochs."""
    seed: CountOrZero = 0
    """Draws batches, augmentation and initial weights."""
    precision: _Precision = "float32"
    """What the model computes in."""
    gradient_accumulation: Count = 1
    """Micro-batches that a global batch is split into; must divide it."""
    sync_batch_norm: Flag = False
    """Whether batch norms take their statistics over all workers."""
    checkpoint_every_epochs: Count = 1
    """Epochs between two checkpoints."""
    num_data_workers: CountOrZero = 0
    """Processes that load data, per worker."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.has("epochs") and given.has("steps"):
            yield Conflict(("steps",), "epochs and steps exclude each other", "leave one of them out")
        if not given.has("epochs") and not given.has("steps"):
            yield Conflict((), "it does not say how long to train", "add epochs or steps")
        yield from _accumulation_conflicts(given)


def _accumulation_conflicts(given: Given) -> Iterator[Conflict]:
    size, parts = given.number("global_batch_size") or 128, given.number("gradient_accumulation") or 1
    if parts >= 1 and size % parts:
        yield Conflict(
            ("gradient_accumulation",),
            f"a global batch of {size} samples does not split into {parts} equal micro-batches",
            f"gradient_accumulation should divide {size}",
        )


class TrainingOverrides(Settings):
    """What a stage trains differently; a key left out is as in the job's training."""

    global_batch_size: Count | None = None
    """Samples of one optimizer step, over all workers."""
    epochs: Count | None = None
    """Passes over the training data; takes the place of the job's steps."""
    steps: Count | None = None
    """Optimizer steps; takes the place of the job's epochs."""
    seed: CountOrZero | None = None
    """Draws batches, augmentation and initial weights."""
    precision: _Precision | None = None
    """What the model computes in."""
    gradient_accumulation: Count | None = None
    """Micro-batches that a global batch is split into; must divide it."""
    sync_batch_norm: Flag | None = None
    """Whether batch norms take their statistics over all workers."""
    checkpoint_every_epochs: Count | None = None
    """Epochs between two checkpoints."""
    num_data_workers: CountOrZero | None = None
    """Processes that load data, per worker."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.has("epochs") and given.has("steps"):
            yield Conflict(("steps",), "epochs and steps exclude each other", "leave one of them out")

    def over(self, training: TrainingConfig) -> TrainingConfig:
        """The job's training with what this stage says in its place."""
        values = {key: getattr(training, key) for key in TrainingConfig.model_fields}
        given = {key: value for key, value in self if value is not None}
        if "epochs" in given or "steps" in given:
            values |= {"epochs": None, "steps": None}
        return TrainingConfig(**(values | given))


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

    num_workers: Count = 1
    """Processes that train."""
    resources_per_worker: dict[Text, NonNegative] = Field(default_factory=lambda: {"CPU": 1.0})
    """What Ray reserves for a worker."""
    use_gpu: _AutoFlag = "auto"
    """Whether workers train on a GPU (auto: when the cluster has enough of them)."""
    threads_per_worker: Count = 1
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


class StorageConfig(Settings):
    """Where artifacts and checkpoints go. Credentials come from AWS_* environment variables alone."""

    uri: Annotated[Text, AfterValidator(_storage_uri)] = "artifacts"
    """A folder, or a URI such as s3://bucket/prefix."""
    endpoint: Annotated[Text, AfterValidator(_endpoint)] | None = None
    """The object store's address, http://host:port (null: AWS_ENDPOINT_URL if set, else Amazon's)."""
    region: Text | None = None
    """The object store's region (null: from the environment)."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        uri = given.text("uri") or "artifacts"
        for key in ("endpoint", "region"):
            if not given.has(key):
                continue
            if not uri.startswith("s3://"):
                yield Conflict((key,), "it is for s3:// URIs", "leave it out, or make uri s3://bucket/prefix")
            elif f"{key}_override=" in uri or f"{key}=" in urlsplit(uri).query:
                yield Conflict((key,), "the URI says it, too", "leave one of them out")


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
    latency_batch_size: Count = 32
    """The batch whose latency is measured beside that of one sample."""
    latency_runs: Count = 50
    """Runs, of which the median counts."""


class ClusterConfig(Settings):
    """Where Ray is."""

    address: Text | None = None
    """The cluster's address (null: RAY_ADDRESS if set, else a local Ray that the job starts itself)."""
    num_cpus: Count | None = None
    """CPUs of the local Ray (null: all)."""


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
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        training, seen = given.child("training"), set[str]()
        for index, stage in enumerate(given.children("stages")):
            name = stage.text("name")
            if name in seen:
                yield Conflict(("stages", index, "name"), f"another stage is named '{name}', too", "names are unique")
            seen |= {name} if name else set()
            if stage.has("training"):
                merged = Given({**training.values, **stage.child("training").values})
                if not list(_accumulation_conflicts(training)):
                    for conflict in _accumulation_conflicts(merged):
                        yield Conflict(("stages", index, "training", *conflict.key), conflict.message, conflict.remedy)
        types = [part.text("type") for stage in given.children("stages") for part in stage.children("compressors")]
        kinds = {COMPRESSORS[name].kind if name in COMPRESSORS else "quantizer" for name in types if name}
        if given.child("int8").values.get("enabled") is True and "quantizer" not in kinds:
            yield Conflict(("int8", "enabled"), "no stage has a quantizer", "add a QATQuantizer, or set it to 'auto'")
