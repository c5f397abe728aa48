"""Data that is Ray Data's: how it is shared out, and what it needs of the cluster beside the workers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import ray.data
import ray.train
from ray.actor import ActorHandle
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.logical.optimizers import get_execution_plan

from raycomp.pipeline.task import Task, given_data


def ray_datasets(task: Task) -> dict[str, ray.data.Dataset]:
    """Those of the task's data sets, "train" and "eval", that are Ray Data's."""
    found = {name: given_data(task, name) for name in ("train", "eval")}
    return {name: data for name, data in found.items() if isinstance(data, ray.data.Dataset)}


def data_cpus(datasets: Iterable[ray.data.Dataset]) -> float:
    """CPUs without which reading these at the same time would never end.

    An actor holds its CPUs as long as its data set is read, which those of training are during an evaluation, too; of
    tasks, one at a time is enough for each data set.
    """
    return sum(map(_cpus, datasets))


def _cpus(data: ray.data.Dataset) -> float:
    # Planning writes what it has optimized into the plan that it is given.
    plan, _ = get_execution_plan(copy.copy(data._logical_plan))
    held, tasks = 0.0, [0.0]
    for operator in plan.dag.post_order_iter():
        if isinstance(operator, InputDataBuffer):
            continue
        at_least = operator.min_max_resource_requirements()[0].cpu
        each_task = operator.incremental_resource_usage().cpu
        if each_task or not at_least:
            tasks.append(each_task or 1.0)  # a shuffle says nothing of its tasks
        else:
            held += at_least
    return held + max(tasks)


class Shards(ray.train.DataConfig):
    """Each worker's shard of the data; every row of evaluation is in one of them, where Ray would drop a rest."""

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: list[ActorHandle] | None,
        worker_node_ids: list[str] | None,
        **kwargs: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        training = {name: data for name, data in datasets.items() if name != "eval"}
        shards = super().configure(training, world_size, worker_handles, worker_node_ids, **kwargs)
        if "eval" in datasets:
            data = datasets["eval"].copy(datasets["eval"])
            data.context.execution_options = self._resolve_execution_options("eval")
            parts = data.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for shard, part in zip(shards, parts, strict=True):
                shard["eval"] = part
        return shards
