"""A job's stages in one process: the same code with and without Ray."""

from raycomp.pipeline.data.batches import Batches, BatchPlan, LoaderContext, MicroBatch, open_batches
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.task import Task, prepare_task
from raycomp.pipeline.training.batch_norm import is_synchronised, restore_batch_norm_, synchronise_batch_norm_
from raycomp.pipeline.training.metrics import evaluate

__all__ = [
    "BatchPlan",
    "Batches",
    "LoaderContext",
    "MicroBatch",
    "Task",
    "build_task",
    "evaluate",
    "is_synchronised",
    "open_batches",
    "prepare_task",
    "restore_batch_norm_",
    "synchronise_batch_norm_",
]
