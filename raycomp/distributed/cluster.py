"""Reaching Ray: a cluster that is there, or a local one that the job starts and stops itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycomp.config import ClusterConfig, JobConfig, ScalingConfig
from raycomp.errors import ClusterError

# Reports block until the controller polls; a replacement worker group is awaited this long.
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
SPARE_CPUS = 1
"""CPUs of a local Ray beyond what workers may take, for the processes that drive them."""


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster.

    Args:
        local: whether this process started it.
        use_gpu: whether the job's workers get GPUs.
        description: one line for the report.
    """

    local: bool
    use_gpu: bool
    description: str


@contextmanager
def connect(job: JobConfig) -> Iterator[Cluster]:
    """Within the block, this process is connected to Ray; what it started is stopped afterwards.

    Raises:
        ClusterError: the cluster can't be reached, or has not what the workers need.
    """
    for name, value in _TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    owned = not ray.is_initialized()
    if owned:
        _init(job.cluster, job.scaling)
    try:
        yield _checked(job.scaling, owned and _address(job.cluster) is None)
    finally:
        if owned:
            ray.shutdown()


def on_head_node() -> bool:
    """Whether this process runs on the cluster's head node."""
    return ray.get_runtime_context().get_node_id() == head_node_id()


def head_node_id() -> str:
    """The head node's id.

    Raises:
        ClusterError: Ray names none.
    """
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeID"])
    raise ClusterError("the cluster has no head node that is alive")


def head_node_options() -> dict[str, object]:
    """Options of a task that must run on the head node."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(head_node_id(), soft=False)}


def _address(config: ClusterConfig) -> str | None:
    return config.address or os.environ.get("RAY_ADDRESS") or None


def _init(config: ClusterConfig, scaling: ScalingConfig) -> None:
    address = _address(config)
    quiet = {"configure_logging": True, "logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is not None:
            ray.init(address=address, runtime_env=_runtime_env(), **quiet)
            return
        # Ray would look for a token in the home folder of a cluster that nobody but this process knows.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        needed = scaling.num_workers * scaling.resources_per_worker.get("CPU", 1.0)
        cpus = config.num_cpus or max(os.cpu_count() or 1, int(-(-needed // 1)))
        ray.init(
            address="local", num_cpus=cpus + SPARE_CPUS, include_dashboard=False, runtime_env=_runtime_env(), **quiet
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(
            f"Ray can't be reached: {reason}",
            where=address or "local Ray",
            remedy="check cluster.address or RAY_ADDRESS",
        ) from None


def _runtime_env() -> dict[str, dict[str, str]] | None:
    """The storage credentials for processes of other nodes; a submitted job's own environment has them already."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    passed = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "RAY_TRAIN_", "RAY_DATA_"))}
    return {"env_vars": passed} if passed else None


def _checked(scaling: ScalingConfig, local: bool) -> Cluster:
    resources = ray.cluster_resources()
    per_worker = dict(scaling.resources_per_worker)
    gpus = per_worker.get("GPU", 1.0) * scaling.num_workers
    use_gpu = 0 < gpus <= resources.get("GPU", 0.0) if scaling.use_gpu == "auto" else scaling.use_gpu
    if use_gpu:
        per_worker.setdefault("GPU", 1.0)
    for name, amount in per_worker.items():
        needed, there = amount * scaling.num_workers, resources.get(name, 0.0)
        if needed > there:
            raise ClusterError(
                f"{scaling.num_workers} workers with {amount:g} {name} each need {needed:g} {name}, "
                f"the cluster has {there:g}",
                where="scaling",
                remedy="fewer num_workers or smaller resources_per_worker, or a larger cluster",
            )
    nodes = sum(node["Alive"] for node in ray.nodes())
    kind = "local Ray" if local else "Ray cluster"
    return Cluster(
        local, use_gpu, f"{kind} {ray.__version__}, {nodes} node{'s' * (nodes != 1)}, {resources.get('CPU', 0):g} CPUs"
    )
