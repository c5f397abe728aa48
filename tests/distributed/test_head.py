"""Work for the head node: in the driver where that is on it, else in a task pinned to it."""

from __future__ import annotations

import os

import pytest
import ray

from raycomp.distributed import cluster
from raycomp.distributed.cluster import head_node_id, on_head_node
from raycomp.errors import SpeedupError

pytestmark = pytest.mark.cluster


def _where() -> tuple[int, str]:
    return os.getpid(), ray.get_runtime_context().get_node_id()


def _refuse() -> None:
    raise SpeedupError("unknown operator", where="conv1", remedy="leave it out")


def test_a_driver_on_the_head_node_works_itself(local_ray: str) -> None:
    assert on_head_node()
    assert cluster.on_head(_where) == (os.getpid(), head_node_id())
    with pytest.raises(SpeedupError, match="unknown operator"):
        cluster.on_head(_refuse)


def test_a_driver_elsewhere_sends_a_task_to_the_head_node(local_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "on_head_node", lambda: False)
    pid, node = cluster.on_head(_where)
    assert pid != os.getpid()
    assert node == head_node_id()
    with pytest.raises(SpeedupError) as caught:
        cluster.on_head(_refuse)
    assert (caught.value.where, caught.value.remedy) == ("conv1", "leave it out")
    assert str(caught.value) == "conv1: unknown operator (leave it out)"
