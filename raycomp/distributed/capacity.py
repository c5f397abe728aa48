"""What the workers of a job need of a cluster, what it has, and how long it gets to grow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray._private.state import state as global_state
from ray.experimental.internal_kv import _internal_kv_get
from ray.util import placement_group, remove_placement_group

from raycomp.config import ScalingConfig

Tell = Callable[[str], None]
_WAIT_S = 600.0
_LOOK_S = 1.0


def demand(scaling: ScalingConfig, *, use_gpu: bool) -> dict[str, float]:
    """What all workers of a job reserve together."""
    per_worker = dict(scaling.resources_per_worker)
    if use_gpu:
        per_worker.setdefault("GPU", 1.0)
    return {name: amount * scaling.num_workers for name, amount in per_worker.items()}


def worker_bundles(scaling: ScalingConfig, *, use_gpu: bool) -> list[dict[str, float]]:
    """What each worker of a job reserves."""
    workers = scaling.num_workers
    each = {name: amount / workers for name, amount in demand(scaling, use_gpu=use_gpu).items()}
    return [each] * workers


def lack_of(needed: Mapping[str, float], workers: int) -> str | None:
    """What the cluster has too little of; None where it has all that is needed."""
    there = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > there.get(name, 0.0):
            each = f"{workers} workers with {amount / workers:g} {name} each need {amount:g} {name}"
            return f"{each}, the cluster has {there.get(name, 0.0):g}"
    return None


def await_growth(
    bundles: Sequence[Mapping[str, float]], look: Callable[[], str | None], wait_s: float | None, tell: Tell
) -> str | None:
    """Asks a cluster that lacks something to grow, and waits for it; gives what it then still lacks.

    Args:
        bundles: all that it should have room for at the same time.
        look: gives what it lacks now.
        wait_s: how long; None as long as a cluster with an autoscaler gets.
        tell: hears that it is waited for.
    """
    found = look()
    wait_s = (_WAIT_S if _has_autoscaler() else 0.0) if wait_s is None else wait_s
    if found is None or wait_s == 0:
        return found
    tell(f"{found}: it gets {wait_s:g} s to grow (cluster.wait_s)")
    # An autoscaler sees what a pending group asks for; other jobs' requests stay as they are.
    asked = placement_group([dict(bundle) for bundle in bundles])
    deadline = time.monotonic() + wait_s
    try:
        while found is not None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            found = look()
    finally:
        remove_placement_group(asked)
    return found


def _has_autoscaler() -> bool:
    """Whether nodes may come by themselves: where none can, Ray's status calls each node a type of its own."""
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    types = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    grows = any(kind != f"node_{node}" for node, kind in types.items())
    return grows or global_state.get_cluster_config() is not None
