"""Data that is Ray Data's: on the job's Ray, with a CPU of its own, and each row of the evaluation counted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch
import yaml

from raycomp.config import ScalingConfig, parse_job
from raycomp.distributed.cluster import Cluster, connect, on_demand
from raycomp.distributed.ray_data import data_cpus, ray_datasets
from raycomp.errors import ClusterError, TaskError
from raycomp.pipeline.task import given, given_data
from tests.contracts import tiny
from tests.contracts.tiny import Tiny
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


@pytest.mark.parametrize("local", [True, False])
def test_workers_that_leave_too_few_cpus_to_the_data_are_refused(monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    cluster = Cluster(local, 2 if local else 0, False, "4 CPUs")
    cluster.require_data_cpus(ScalingConfig(num_workers=4), 0)
    cluster.require_data_cpus(ScalingConfig(num_workers=3), 1)
    cluster.require_data_cpus(ScalingConfig(num_workers=4, resources_per_worker={"CPU": 0.75}), 1)
    with pytest.raises(ClusterError, match=r"need 3 CPUs at the same time, and the workers leave 2 \(") as caught:
        cluster.require_data_cpus(ScalingConfig(num_workers=2), 3)
    # 2 for workers and 3 for data, of which such a Ray has 2 by itself.
    assert ("set cluster.num_cpus to 3" in str(caught.value)) is local


def _same(batch: Any) -> Any:
    return batch


class _Same:
    def __call__(self, batch: Any) -> Any:
        return batch


def _actors(data: ray.data.Dataset, count: int, **more: Any) -> ray.data.Dataset:
    return data.map_batches(_Same, compute=ray.data.ActorPoolStrategy(size=count), **more)


@pytest.mark.cluster
def test_what_data_needs_is_its_actors_and_its_largest_task(local_ray: str) -> None:
    rows = ray.data.range(8)
    expected = {
        "read": (rows, 1),
        "tasks": (rows.map_batches(_same).map_batches(_same, batch_size=2), 1),
        "a large task": (rows.map_batches(_same, num_cpus=3), 3),
        "half a task": (ray.data.from_items([1]).map_batches(_same, num_cpus=0.5), 0.5),
        "actors that read": (_actors(rows, 2), 2),
        "actors with tasks": (_actors(rows.map_batches(_same), 2, num_cpus=2), 5),
        "two pools": (_actors(_actors(rows, 1), 2), 3),
        "shuffled": (rows.random_shuffle(), 1),
        "sorted": (rows.sort("id"), 1),
    }
    assert {name: data_cpus([data]) for name, (data, _) in expected.items()} == {
        name: cpus for name, (_, cpus) in expected.items()
    }
    assert data_cpus([rows, _actors(rows, 2)]) == 3
    assert data_cpus([]) == 0


class _Drawing(Tiny):
    """Draws the rows of its evaluation; training would leave them out."""

    def eval_data(self) -> ray.data.Dataset:
        rows = [torch.randperm(1000)[0].item(), np.random.randint(1000), random.randrange(1000)]
        return ray.data.from_items([{"id": row} for row in rows])


@pytest.mark.cluster
def test_what_a_task_draws_for_ray_data_is_what_each_worker_draws(local_ray: str) -> None:
    """Else training data that leaves out the rows of evaluation, drawn on a worker, would hold some of them."""

    def drawn(data: Any) -> list[int]:
        return [row["id"] for row in data.take_all()]

    task = _Drawing()
    found = ray_datasets(task)
    assert list(found) == ["eval"]
    assert drawn(found["eval"]) == drawn(given_data(task, "eval")) == drawn(ray_datasets(_Drawing())["eval"])


def _unreadable(batch: Any) -> Any:
    raise ValueError(f"row {batch['id'][0]} can't be read\nat all")


class _Unreadable(Tiny):
    def train_data(self) -> ray.data.Dataset:
        return ray.data.range(3).map_batches(_unreadable)


@pytest.mark.cluster
def test_an_error_in_a_data_task_is_one_error_with_its_place(local_ray: str) -> None:
    """Of which Ray tells a traceback in colours, and what followed from it."""
    with pytest.raises(TaskError) as caught:
        given(_Unreadable(), "example_input")
    assert caught.value.message == "_Unreadable.example_input() raised ValueError: row 0 can't be read\nat all"
    assert caught.value.where is not None
    file, _, line = caught.value.where.rpartition(":")
    assert file == __file__ and "raise ValueError" in Path(__file__).read_text().splitlines()[int(line) - 1]


@pytest.mark.cluster
def test_a_lost_process_of_ray_s_is_told_by_raycomp_alone(local_ray: str, capfd: pytest.CaptureFixture[str]) -> None:
    @ray.remote(max_retries=0)
    def lost() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with connect(parse_job(tiny.job(steps=1) | {"scaling": {"num_workers": 1}})):
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(lost.remote())
        time.sleep(2)
    assert "raylet" not in "".join(capfd.readouterr())
