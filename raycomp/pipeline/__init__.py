"""A job's stages in one process: the same code with and without Ray."""

from raycomp.pipeline.data.plan import LoaderContext
from raycomp.pipeline.task import Task

__all__ = ["LoaderContext", "Task"]
