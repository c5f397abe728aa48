"""How many trials fit on a cluster at once, so that none waits for workers that another holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raycomp.config import JobConfig
from raycomp.distributed.capacity import demand

# A trial drives its job from the head node, as a plain job's driver does, and takes no CPU from the workers.
TRIAL_RESOURCES = {"node:__internal_head__": 0.001}


def largest(jobs: Iterable[JobConfig]) -> JobConfig:
    """The job whose workers need the most CPUs."""
    return max(jobs, key=lambda job: demand(job.scaling, use_gpu=False).get("CPU", 0.0))


def trials_at_once(
    jobs: Iterable[JobConfig], resources: Mapping[str, float], *, use_gpu: bool, data_cpus: float = 0.0
) -> int:
    """How many jobs the cluster holds at the same time, whichever of them they are; at least one.

    Args:
        jobs: the trials' jobs.
        resources: all that the cluster has.
        use_gpu: whether workers get GPUs.
        data_cpus: what each job's data needs beside its workers.
    """
    counts = [
        int(resources.get(name, 0.0) / needed)
        for job in jobs
        for name, amount in demand(job.scaling, use_gpu=use_gpu).items()
        if (needed := amount + data_cpus * (name == "CPU")) > 0
    ]
    return max(1, min(counts, default=1))
