"""Reaching Ray: a cluster that is there, or a local one that the job starts and stops itself."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data
from ray import _raylet
from ray._private import auto_init_hook
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycomp.config import ClusterConfig, JobConfig, ScalingConfig
from raycomp.distributed.capacity import Tell, await_growth, demand, lack_of, worker_bundles
from raycomp.distributed.interrupt import held_back, raise_if_interrupted, same_signals
from raycomp.distributed.local_ray import QUIET, local_folder, local_ray
from raycomp.errors import ClusterError, RaycompError
from raycomp.storage import s3

Result = TypeVar("Result")

# Reports block until the controller polls; a replacement worker group is awaited this long.
_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}
# Whether Ray's C++ core has put its handler on SIGTERM and crashes in this process: it does so once.
_HANDLES_SIGNALS = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"
_MOST_WORKERS_PER_CORE = 4
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # is set for the driver of a submitted job
# CPUs of a local Ray beyond what workers may take: for what user code asks of Ray, or a task each of two data sets.
_SPARE_CPUS, _DATA_CPUS = 1, 2


def _silent(line: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster.

    Args:
        local: whether a job started it.
        spare_cpus: those of a local one that are beyond what workers may take.
        use_gpu: whether the job's workers get GPUs.
        description: one line for the report.
    """

    local: bool
    spare_cpus: int
    use_gpu: bool
    description: str

    def require_data_cpus(
        self, scaling: ScalingConfig, needed: float, wait_s: float | None = 0.0, tell: Tell = _silent
    ) -> None:
        """Sees to it that the workers leave enough CPUs to Ray Data's tasks, which would else wait for ever.

        Args:
            scaling: says what the workers need.
            needed: CPUs for Ray Data.
            wait_s: how long a cluster that lacks them gets to grow, as in `await_growth`; a local one can't.
            tell: hears that it is waited for.

        Raises:
            ClusterError: they leave too few.
        """
        workers = demand(scaling, use_gpu=False).get("CPU", 0.0)

        def left() -> float:
            return ray.cluster_resources().get("CPU", 0.0) - workers

        def lack() -> str | None:
            return None if left() >= needed else f"Ray Data needs {needed:g} CPU, and the workers leave {left():g}"

        bundles = [*worker_bundles(scaling, use_gpu=self.use_gpu), *[{"CPU": 1.0}] * math.ceil(needed)]
        if lack() is None or (not self.local and await_growth(bundles, lack, wait_s, tell) is None):
            return
        remedy = "fewer num_workers, or less CPU in resources_per_worker"
        if self.local:
            remedy = f"set cluster.num_cpus to {math.ceil(workers + needed - self.spare_cpus)}, or {remedy}"
        raise ClusterError(
            f"the data is Ray Data's, whose actors and tasks need {needed:g} CPU{'s' * (needed != 1)} at the same "
            f"time, and the workers leave {left():g}",
            where="scaling",
            remedy=remedy,
        )


@contextmanager
def connect(job: JobConfig, tell: Tell = _silent, *, for_data: bool = False) -> Iterator[Cluster]:
    """Within the block, this process is connected to Ray; what it started is stopped afterwards.

    Args:
        job: says where Ray is, and what the workers need.
        tell: hears what the job's user should know.
        for_data: whether data are Ray Data's, whose tasks need CPUs, too.

    Raises:
        ClusterError: the cluster can't be reached, or has not what the workers need.
    """
    for name, value in _TRAIN_SETTINGS.items():
        os.environ.setdefault(name, value)
    spare = _DATA_CPUS if for_data else _SPARE_CPUS
    with ExitStack() as stack:
        stack.enter_context(_raylet_unheard())  # in Ray's last seconds, too
        if not ray.is_initialized():
            with same_signals(), _deaf():
                _start(stack, job, tell, spare)
            raise_if_interrupted()
        stack.enter_context(_quiet())
        yield _checked(job, tell, spare)


@contextmanager
def _deaf() -> Iterator[None]:
    """Within the block, Ray takes no signal for itself, and none finds it half connected.

    Its way out would be `sys.exit`, with a code and not a word; that of its C++ core, from the midst of the connection
    on, an abort with a stack of calls.
    """
    with suppress(ValueError):  # a Ray without it: `same_signals` takes the signal back once Ray is connected
        ctypes.c_bool.in_dll(ctypes.CDLL(_raylet.__file__), _HANDLES_SIGNALS).value = True
    handler, connecting = ray_utils.set_sigterm_handler, ray_worker.connect

    def connect_whole(*args: Any, **kwargs: Any) -> None:
        with held_back():
            connecting(*args, **kwargs)

    ray_utils.set_sigterm_handler = lambda handler: None
    ray_worker.connect = connect_whole
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler, ray_worker.connect = handler, connecting


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Ray's tracebacks, logs and progress bars from the terminal: each cause is told in a line of raycomp's."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.train", "ray.data", "ray.tune")]
    levels = [logger.level for logger in loggers]
    context = ray.data.DataContext.get_current()
    bars = context.enable_progress_bars
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _raylet_unheard() -> Iterator[None]:
    """Keeps what Ray's own processes warn of from the terminal."""
    printed = ray_worker.print_to_stdstream
    ray_worker.print_to_stdstream = lambda data, *args, **more: (
        None if data.get("pid") == "raylet" else printed(data, *args, **more)
    )
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = printed


@contextmanager
def on_demand(start: Callable[[], object]) -> Iterator[None]:
    """Within the block, code that touches Ray before it is connected gets what `start` connects to.

    Ray would connect or start one by itself, and know nothing of the job's cluster and CPUs.
    """
    before = auto_init_hook.auto_init_ray
    auto_init_hook.auto_init_ray = lambda: None if ray.is_initialized() else start()
    try:
        yield
    finally:
        auto_init_hook.auto_init_ray = before


def exposure(names: Sequence[str]) -> str:
    """Who can read secrets that Ray is given, and how to give it none."""
    return (
        f"{', '.join(names)} go to the cluster in Ray's runtime environment, where whoever sees its logs or its Jobs "
        "API can read them; to send none, set cluster.send_credentials: false and give the nodes a role that may use "
        "the storage, or a mounted file of credentials"
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


def on_head(function: Callable[..., Result], *args: Any) -> Result:
    """Runs `function(*args)` on the head node.

    Raises:
        RaycompError: as the function raised it, also where it ran in a task.
    """
    if on_head_node():
        return function(*args)
    try:
        return ray.get(ray.remote(**head_node_options())(function).remote(*args))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaycompError):
            raise error.cause from None
        raise


def has_other_files(config: ClusterConfig) -> bool:
    """Whether workers run on a cluster that has not been sent the files beside the driver, as `ray job submit` does."""
    return _address(config) is not None and _SUBMITTED not in os.environ


def _address(config: ClusterConfig) -> str | None:
    return config.address or os.environ.get("RAY_ADDRESS") or None


def _start(stack: ExitStack, job: JobConfig, tell: Tell, spare: int) -> None:
    address = _address(job.cluster)
    try:
        if address is None:
            stack.enter_context(local_ray(_local_cpus(job, tell) + spare))
        else:
            stack.callback(ray.shutdown)
            ray.init(address=address, runtime_env=_runtime_env(job, tell), **QUIET)
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        token = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token"
        refused = isinstance(error, ray.exceptions.AuthenticationError)
        raise ClusterError(
            f"Ray can't be reached: {reason}",
            where=address or "local Ray",
            remedy=token if refused else "check cluster.address or RAY_ADDRESS",
        ) from None


def _local_cpus(job: JobConfig, tell: Tell) -> int:
    """CPUs of a local Ray: what the job says, else the machine's, or more where the workers need them."""
    workers, cores = job.scaling.num_workers, os.cpu_count() or 1
    if job.cluster.num_cpus is not None:
        return job.cluster.num_cpus
    if workers > _MOST_WORKERS_PER_CORE * cores:
        raise ClusterError(
            f"{workers} workers on {cores} cores of this machine would hardly come to a first step",
            where="scaling.num_workers",
            remedy=f"{cores} is as fast as it gets here; set cluster.num_cpus to have it all the same",
        )
    if workers > cores:
        tell(f"{workers} workers share {cores} cores of this machine: {cores} workers would be faster")
    return max(cores, math.ceil(demand(job.scaling, use_gpu=False).get("CPU", 0.0)))


def _runtime_env(job: JobConfig, tell: Tell) -> dict[str, dict[str, str]] | None:
    """What processes of other nodes need; a submitted job's own environment has it already."""
    if _SUBMITTED in os.environ:
        return None
    passed = {name: os.environ[name] for name in _TRAIN_SETTINGS}
    if job.storage.uri.startswith("s3://"):
        passed |= s3.environment(credentials=job.cluster.send_credentials)
        secret = s3.secrets_in(passed)
        if secret:
            tell(exposure(secret))
    return {"env_vars": passed}


def _checked(job: JobConfig, tell: Tell, spare: int) -> Cluster:
    scaling, local = job.scaling, local_folder() is not None
    resources = ray.cluster_resources()
    gpus = scaling.resources_per_worker.get("GPU", 1.0) * scaling.num_workers
    use_gpu = 0 < gpus <= resources.get("GPU", 0.0) if scaling.use_gpu == "auto" else scaling.use_gpu
    needed = demand(scaling, use_gpu=use_gpu)
    lack = lack_of(needed, scaling.num_workers)
    if lack is not None and not local:
        bundles = worker_bundles(scaling, use_gpu=use_gpu)
        lack = await_growth(bundles, lambda: lack_of(needed, scaling.num_workers), job.cluster.wait_s, tell)
    if lack is not None:
        raise ClusterError(
            lack,
            where="scaling",
            remedy="fewer num_workers or smaller resources_per_worker, or a larger cluster; one that grows is waited "
            "for as long as cluster.wait_s says",
        )
    nodes = sum(node["Alive"] for node in ray.nodes())
    kind = "local Ray" if local else "Ray cluster"
    cpus = ray.cluster_resources().get("CPU", 0)
    described = f"{kind} {ray.__version__}, {nodes} node{'s' * (nodes != 1)}, {cpus:g} CPUs"
    return Cluster(local, spare if local else 0, use_gpu, described)
