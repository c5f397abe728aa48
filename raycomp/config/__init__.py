"""What a job says: frozen strict settings, YAML in, errors with the key's place out. Imports no torch."""

from raycomp.config.base import Settings
from raycomp.config.compressors import (
    COMPRESSORS,
    AGPPrunerConfig,
    CompressorConfig,
    DynamicLayerwiseDistillerConfig,
    L1NormPrunerConfig,
    LinearPrunerConfig,
    QATQuantizerConfig,
    TaylorPrunerConfig,
)
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
from raycomp.config.loader import SourceMap, load_job, parse_config_list, parse_job, parse_path, read_job, set_key
from raycomp.config.schema import job_schema
from raycomp.config.storage import StorageConfig
from raycomp.config.training import TrainingConfig, TrainingOverrides
from raycomp.config.values import format_path, nearest

__all__ = [
    "COMPRESSORS",
    "AGPPrunerConfig",
    "Align",
    "ClusterConfig",
    "CompressorConfig",
    "DistillEntry",
    "DistillTarget",
    "DynamicLayerwiseDistillerConfig",
    "Entry",
    "EvaluationConfig",
    "Granularity",
    "Int8Config",
    "JobConfig",
    "L1NormPrunerConfig",
    "LinearPrunerConfig",
    "PruneEntry",
    "PruneTarget",
    "QATQuantizerConfig",
    "QuantizeEntry",
    "QuantizeTarget",
    "ScalingConfig",
    "SelectionEntry",
    "Settings",
    "SourceMap",
    "SpeedupConfig",
    "StageConfig",
    "StorageConfig",
    "TaskConfig",
    "TaylorPrunerConfig",
    "TrainingConfig",
    "TrainingOverrides",
    "canonical_target",
    "format_path",
    "job_schema",
    "load_job",
    "nearest",
    "parse_config_list",
    "parse_job",
    "parse_path",
    "read_job",
    "set_key",
]
