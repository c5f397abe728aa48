"""Data that is Ray Data's: on the job's Ray, with a CPU of its own, and each row of the evaluation counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

from raycomp.config import ScalingConfig
from raycomp.distributed.cluster import Cluster, on_demand
from raycomp.errors import ClusterError
from tests.distributed.conftest import ROOT

# The function of a data task is the file's own, which no other process can import by its name.
_TASK = """
import numpy as np, ray.data, torch
from torch import nn
from raycomp import Task

class Rows(Task):
    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def train_data(self):
        return rows(64)

    def eval_data(self):
        return rows(33)

    def inputs(self, batch):
        return (batch["x"],), {}

    def metrics(self, output, batch):
        return {"mean_id": batch["id"].double()}

def row(given):
    x = np.random.default_rng(int(given["id"])).standard_normal(4).astype("float32")
    return {"id": given["id"], "x": x, "label": int(x.mean() > 0)}

def rows(count):
    return ray.data.range(count).map(row)
"""
_JOB = {
    "name": "rows",
    "task": {"entrypoint": "rows.py:Rows"},
    "stages": [
        {
            "name": "prune",
            "compressors": [{"type": "L1NormPruner", "config_list": [{"op_names": ["0"], "sparse_ratio": 0.5}]}],
        }
    ],
    "training": {"global_batch_size": 32, "steps": 2},
    "evaluation": {"latency_runs": 2, "latency_batch_size": 2},
    "scaling": {"num_workers": 2},
    "cluster": {"num_cpus": 2},
    "storage": {"uri": "stored"},
}


@pytest.mark.cluster
def test_as_many_workers_as_cpus_leave_one_to_the_data_and_every_row_of_33_counts(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(_TASK)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(_JOB))
    ended = subprocess.run(
        [sys.executable, "-m", "raycomp", "run", "job.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    # The mean of 0 to 32; without the last row it would be 15.5.
    assert "mean_id 16 " in ended.stderr
    assert "on local Ray" in ended.stderr
    assert not any(noise in ended.stdout + ended.stderr for noise in ("INFO", "Running", "Traceback", "UserWarning"))


class _Asked(Exception):
    pass


def test_a_task_that_touches_ray_gets_the_job_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def start() -> None:
        raise _Asked

    with pytest.raises(_Asked), on_demand(start):
        ray.put(1)


def test_workers_that_leave_no_cpu_to_the_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    cluster = Cluster(False, False, "4 CPUs")
    cluster.require_data_cpu(ScalingConfig(num_workers=3))
    cluster.require_data_cpu(ScalingConfig(num_workers=4, resources_per_worker={"CPU": 0.75}))
    with pytest.raises(ClusterError, match=r"need a CPU, and the workers leave 0 of them \(fewer num_workers"):
        cluster.require_data_cpu(ScalingConfig(num_workers=4))
