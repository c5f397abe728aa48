"""The cluster files are what Ray and KubeRay take, and agree with the repository."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray.autoscaler._private.util import prepare_config, validate_config

from raycomp.cli import main
from raycomp.config import load_job

ROOT = Path(__file__).parents[1]
LAUNCHER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
RAYJOB = yaml.safe_load((ROOT / "examples/kuberay-rayjob.yaml").read_text())


def _pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_ray_takes_the_launcher_file() -> None:
    validate_config(prepare_config(copy.deepcopy(LAUNCHER)))


@pytest.mark.parametrize(
    ("key", "value"), [("max_worker", 3), ("max_workers", "many"), ("head_node_type", "boss"), ("provider", {})]
)
def test_ray_would_not_take_a_wrong_one(key: str, value: Any) -> None:
    with pytest.raises(Exception, match=r".+"):
        validate_config(prepare_config({**copy.deepcopy(LAUNCHER), key: value}))


def test_the_launcher_installs_torch_before_raycomp_from_the_files_it_sends() -> None:
    torch, own = LAUNCHER["setup_commands"]
    (target,) = [remote for remote, local in LAUNCHER["file_mounts"].items() if local == "."]
    assert " torch " in f"{torch} " and f"{target}/constraints.txt" in torch
    assert f"{target}[" in own and f"{target}/constraints.txt" in own
    assert (ROOT / "constraints.txt").is_file() and (ROOT / "pyproject.toml").is_file()


def test_the_launched_cluster_trains_on_its_workers_alone() -> None:
    types = LAUNCHER["available_node_types"]
    assert types[LAUNCHER["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["worker"]["min_workers"] >= 1, "a job is refused on a cluster without CPUs"


def test_the_dashboard_of_the_launched_cluster_is_not_open_to_the_network() -> None:
    (start,) = [line for line in LAUNCHER["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start


def test_both_files_name_the_ray_that_raycomp_is_tested_with() -> None:
    version = _pinned("ray")
    assert f":{version}-" in LAUNCHER["docker"]["image"]
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == version


def test_the_rayjob_has_what_kuberay_requires() -> None:
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", RAYJOB["metadata"]["name"])
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert {"name", "image", "resources"} <= container.keys()
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["envFrom"] == [{"secretRef": {"name": "raycomp-storage"}}]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1


def test_the_rayjob_has_room_for_the_job_it_runs() -> None:
    job = load_job(ROOT / "examples/digits.yaml")
    needed = job.scaling.num_workers * job.scaling.resources_per_worker["CPU"]
    workers = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    cpus = sum(
        group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in workers
    )
    assert cpus >= needed


def test_the_rayjobs_entrypoint_is_a_command_that_raycomp_has(monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(RAYJOB["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "raycomp"]
    monkeypatch.chdir(ROOT)
    arguments = [word.replace("/home/ray/raycomp/", "") for word in words[3:]]
    seen: list[object] = []

    class Job:
        def __init__(self, config: Any, base_dir: Path, source: Any = None) -> None:
            seen.append(config.storage.uri)

        def fit(self, **options: Any) -> None:
            seen.append(options["resume"])
            raise KeyboardInterrupt

    monkeypatch.setattr("raycomp.distributed.job.CompressionJob", Job)
    CliRunner().invoke(main, arguments)
    assert seen == ["s3://BUCKET/PREFIX", True]
