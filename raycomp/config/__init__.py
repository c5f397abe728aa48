"""What a job says: frozen strict settings, YAML in, errors with the key's path and line out. Imports no torch."""

from raycomp.config.base import Settings
from raycomp.config.change import set_key
from raycomp.config.compressors import CompressorConfig
from raycomp.config.entries import (
    Align,
    DistillEntry,
    DistillTarget,
    Entry,
    Granularity,
    PruneEntry,
    PruneTarget,
    QuantizeEntry,
    QuantizeTarget,
    SelectionEntry,
    canonical_target,
)
from raycomp.config.job import (
    ClusterConfig,
    EvaluationConfig,
    Int8Config,
    JobConfig,
    ScalingConfig,
    SpeedupConfig,
    StageConfig,
    TaskConfig,
)
from raycomp.config.loader import JobFile, load_job, load_job_file, parse_config_list, parse_job, read_job
from raycomp.config.registry import COMPRESSORS, CompressorSettings, Need, Registration
from raycomp.config.schema import job_schema, sweep_schema
from raycomp.config.source import SourceMap, read_value
from raycomp.config.storage import StorageConfig
from raycomp.config.training import TrainingConfig, TrainingOverrides
from raycomp.config.values import format_path, nearest, parse_path

__all__ = [
    "COMPRESSORS",
    "Align",
    "ClusterConfig",
    "CompressorConfig",
    "CompressorSettings",
    "DistillEntry",
    "DistillTarget",
    "Entry",
    "EvaluationConfig",
    "Granularity",
    "Int8Config",
    "JobConfig",
    "JobFile",
    "Need",
    "PruneEntry",
    "PruneTarget",
    "QuantizeEntry",
    "QuantizeTarget",
    "Registration",
    "ScalingConfig",
    "SelectionEntry",
    "Settings",
    "SourceMap",
    "SpeedupConfig",
    "StageConfig",
    "StorageConfig",
    "TaskConfig",
    "TrainingConfig",
    "TrainingOverrides",
    "canonical_target",
    "format_path",
    "job_schema",
    "load_job",
    "load_job_file",
    "nearest",
    "parse_config_list",
    "parse_job",
    "parse_path",
    "read_job",
    "read_value",
    "set_key",
    "sweep_schema",
]
