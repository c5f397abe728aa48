"""What the workers of a job need of a cluster, what it has, and how long it gets to grow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

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


def lack_of(needed: Mapping[str, float], workers: int) -> str | None:
    """What the cluster has too little of; None where it has all that is needed."""
    there = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > there.get(name, 0.0):
            each = f"{workers} workers with {amount / workers:g} {name} each need {amount:g} {name}"
            return f"{each}, the cluster has {there.get(name, 0.0):g}"
    return None


def await_growth(needed: Mapping[str, float], workers: int, lack: str, wait_s: float | None, tell: Tell) -> str | None:
    """Asks the cluster to grow, and waits for it; gives what it then still lacks."""
    wait_s = (_WAIT_S if _has_autoscaler() else 0.0) if wait_s is None else wait_s
    if wait_s == 0:
        return lack
    tell(f"{lack}: it gets {wait_s:g} s to grow (cluster.wait_s)")
    # An autoscaler sees what a pending group asks for; other jobs' requests stay as they are.
    asked = placement_group([{name: amount / workers for name, amount in needed.items()}] * workers)
    deadline, found = time.monotonic() + wait_s, lack_of(needed, workers)
    try:
        while found is not None and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            found = lack_of(needed, workers)
    finally:
        remove_placement_group(asked)
    return found


def _has_autoscaler() -> bool:
    """Whether nodes may come by themselves: where none can, Ray's status calls each node a type of its own."""
    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    types = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    grows = any(kind != f"node_{node}" for node, kind in types.items())
    return grows or global_state.get_cluster_config() is not None
