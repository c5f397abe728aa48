"""Reaching Ray: a cluster that is there, or a local one that the job starts and stops itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycomp.config import ClusterConfig, JobConfig, ScalingConfig
from raycomp.distributed.local_ray import QUIET, local_folder, local_ray
from raycomp.errors import ClusterError
from raycomp.storage import s3

# Reports block until the controller polls; a replacement worker group is awaited this long.
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
Tell = Callable[[str], None]
SPARE_CPUS = 1
"""CPUs of a local Ray beyond what workers may take, for the processes that drive them."""


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster.

    Args:
        local: whether a job started it.
        use_gpu: whether the job's workers get GPUs.
        description: one line for the report.
    """

    local: bool
    use_gpu: bool
    description: str


def _silent(line: str) -> None:
    """Tells nobody."""


@contextmanager
def connect(job: JobConfig, tell: Tell = _silent) -> Iterator[Cluster]:
    """Within the block, this process is connected to Ray; what it started is stopped afterwards.

    Args:
        job: says where Ray is, and what the workers need.
        tell: hears what the job's user should know.

    Raises:
        ClusterError: the cluster can't be reached, or has not what the workers need.
    """
    for name, value in _TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    with ExitStack() as stack:
        if not ray.is_initialized():
            _start(stack, job, tell)
        yield _checked(job.scaling)


def exposure(names: Sequence[str]) -> str:
    """Who can read secrets that Ray is given, and how to give it none."""
    return (
        f"{', '.join(names)} go to the cluster in Ray's runtime environment, which its logs and its Jobs API show; "
        "cluster.send_credentials: false sends none, where a role or a mounted file of the nodes serves"
    )


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


def _start(stack: ExitStack, job: JobConfig, tell: Tell) -> None:
    address = _address(job.cluster)
    try:
        if address is None:
            stack.enter_context(local_ray(_local_cpus(job)))
        else:
            stack.callback(ray.shutdown)
            ray.init(address=address, runtime_env=_runtime_env(job, tell), **QUIET)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ClusterError(
            f"Ray can't be reached: {reason}",
            where=address or "local Ray",
            remedy="check cluster.address or RAY_ADDRESS",
        ) from None


def _local_cpus(job: JobConfig) -> int:
    needed = job.scaling.num_workers * job.scaling.resources_per_worker.get("CPU", 1.0)
    return (job.cluster.num_cpus or max(os.cpu_count() or 1, math.ceil(needed))) + SPARE_CPUS


def _runtime_env(job: JobConfig, tell: Tell) -> dict[str, dict[str, str]] | None:
    """What processes of other nodes need; a submitted job's own environment has it already."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    passed = {name: os.environ[name] for name in _TRAIN_SETTINGS}
    if job.storage.uri.startswith("s3://"):
        passed |= s3.environment(credentials=job.cluster.send_credentials)
        secret = s3.secrets_in(passed)
        if secret:
            tell(exposure(secret))
    return {"env_vars": passed}


def _checked(scaling: ScalingConfig) -> Cluster:
    local = local_folder() is not None
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
