"""What a job asks of a cluster: refused at once where it can never be there, waited for where the cluster may grow."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray

from raycomp import CompressionJob
from raycomp.config import ScalingConfig, parse_job
from raycomp.distributed import capacity, cluster
from raycomp.distributed.capacity import await_growth, lack_of, worker_bundles
from raycomp.errors import ClusterError, ConfigError
from tests.contracts import tiny
from tests.distributed.conftest import ROOT

_NEEDED = {"CPU": 8.0}


class Growing:
    """A cluster of 2 CPUs that gets 2 more at each look from the third on, for whom asks for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, autoscaler: bool = True) -> None:
        self.cpus, self.looks, self.asked, self.removed = 2.0, 0, list[Any](), list[Any]()
        monkeypatch.setattr(capacity, "_LOOK_S", 0.01)
        monkeypatch.setattr(capacity, "_has_autoscaler", lambda: autoscaler)
        monkeypatch.setattr(ray, "cluster_resources", self.resources)
        monkeypatch.setattr(capacity, "placement_group", lambda bundles: self.asked.append(bundles) or "group")
        monkeypatch.setattr(capacity, "remove_placement_group", self.removed.append)

    def resources(self) -> dict[str, float]:
        self.looks += 1
        if self.asked and self.looks >= 3:
            self.cpus += 2
        return {"CPU": self.cpus}


def _awaited(wait_s: float | None, told: list[str]) -> str | None:
    bundles = worker_bundles(ScalingConfig(num_workers=4, resources_per_worker={"CPU": 2}), use_gpu=False)
    return await_growth(bundles, lambda: lack_of(_NEEDED, 4), wait_s, told.append)


def test_a_cluster_that_grows_is_waited_for_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    growing, told = Growing(monkeypatch), list[str]()
    assert _awaited(None, told) is None
    assert growing.cpus >= 8 and growing.asked == [[{"CPU": 2.0}] * 4] and growing.removed == ["group"]
    assert told == ["4 workers with 2 CPU each need 8 CPU, the cluster has 2: it gets 600 s to grow (cluster.wait_s)"]


def test_a_cluster_without_an_autoscaler_is_not_waited_for_unless_the_job_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    growing, told = Growing(monkeypatch, autoscaler=False), list[str]()
    assert _awaited(None, told) == "4 workers with 2 CPU each need 8 CPU, the cluster has 2"
    assert growing.asked == [] and told == []
    assert _awaited(5, told) is None


def test_a_cluster_is_waited_for_until_it_has_room_for_ray_data_beside_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    growing, told = Growing(monkeypatch), list[str]()
    there = cluster.Cluster(local=False, spare_cpus=0, use_gpu=False, description="2 CPUs")
    there.require_data_cpus(ScalingConfig(num_workers=2), 3, None, told.append)
    assert growing.cpus >= 5 and growing.asked == [[{"CPU": 1.0}] * 5] and growing.removed == ["group"]
    assert told == ["Ray Data needs 3 CPU, and the workers leave 0: it gets 600 s to grow (cluster.wait_s)"]


def test_the_wait_ends_and_asks_for_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = Growing(monkeypatch)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert "the cluster has 2" in (_awaited(0.05, []) or "")
    assert growing.removed == ["group"]


@pytest.mark.parametrize(
    ("types", "grows"),
    [({"a1": "node_a1", "b2": "node_b2"}, False), ({"a1": "node_a1", "b2": "ray.worker.cpu"}, True), ({}, False)],
)
def test_an_autoscaler_is_seen_by_the_types_that_it_gives_nodes(
    types: dict[str, str], grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = json.dumps({"autoscaler_report": {"node_type_mapping": types}})
    monkeypatch.setattr(capacity, "_internal_kv_get", lambda _: status.encode())
    monkeypatch.setattr(capacity.global_state, "get_cluster_config", lambda: None)
    assert capacity._has_autoscaler() is grows


def _cpus(workers: int, told: list[str], **more: Any) -> int:
    job = tiny.job(steps=1) | {"scaling": {"num_workers": workers}, "cluster": more}
    return cluster._local_cpus(parse_job(job), told.append)


def test_more_workers_than_cores_are_told_and_far_more_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    told: list[str] = []
    assert _cpus(2, told) == 2 and told == []
    assert _cpus(4, told) == 4
    assert told == ["4 workers share 2 cores of this machine: 2 workers would be faster"]
    with pytest.raises(ClusterError, match=r"scaling.num_workers: 16 workers on 2 cores .* set cluster.num_cpus"):
        _cpus(16, told)
    assert _cpus(16, told, num_cpus=16) == 16


def test_storage_in_the_folder_that_ray_deletes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `ray job submit` runs jobs/compress.py: in Ray's copy of the working directory."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for uri in ("artifacts", str(folder / "deep" / "artifacts")):
        job = tiny.job(tiny.pruner("L1NormPruner"), steps=1) | {"storage": {"uri": uri}}
        with pytest.raises(ConfigError, match=r"storage\.uri: .* which Ray deletes \(an s3:// URI"):
            CompressionJob(job, base_dir=ROOT).validate()
    assert list(folder.iterdir()) == []


def test_what_ray_says_in_its_last_seconds_stays_out_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped after the block, and warned of its own worker processes until then."""
    printed: list[str] = []

    def warn() -> None:
        data = {"lines": ["6 PYTHON worker processes have been started"], "pid": "raylet"}
        cluster.ray_worker.print_to_stdstream(data)

    def start(stack: ExitStack, *_: object) -> None:
        stack.callback(warn)
        warn()

    monkeypatch.setattr(cluster.ray_worker, "print_to_stdstream", lambda data, *_: printed.extend(data["lines"]))
    monkeypatch.setattr(cluster, "_start", start)
    monkeypatch.setattr(cluster, "_checked", lambda *_: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with cluster.connect(parse_job(tiny.job(tiny.quantizer()))):
        warn()
    assert printed == []
    warn()
    assert len(printed) == 1
