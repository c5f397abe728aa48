from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raycomp.deploy.measure import (
    count_parameters,
    file_bytes,
    hardware,
    latencies_s,
    latency_s,
    parse_cpu_info,
)
from raycomp.errors import SpeedupError


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 16 + 4 + 4 + 4


class Recorder:
    def __init__(self, name: str, calls: list[tuple[str, int]], seconds: float = 0.0) -> None:
        self.name, self.calls, self.seconds = name, calls, seconds

    def __call__(self, x: Tensor) -> None:
        self.calls.append((self.name, x.shape[0]))
        start = time.perf_counter()
        while time.perf_counter() - start < self.seconds:
            pass


def test_models_are_timed_in_turn_after_warming_up() -> None:
    calls: list[tuple[str, int]] = []
    models = {"a": Recorder("a", calls, 0.002), "b": Recorder("b", calls)}
    times = latencies_s(models, torch.randn(2, 3), batch_size=5, runs=3, warmup=1)
    assert calls == [("a", 5), ("b", 5)] * 4
    assert times["a"] >= 0.002 > times["b"] > 0


def test_timing_ends_at_its_limit_with_a_figure() -> None:
    calls: list[tuple[str, int]] = []
    times = latencies_s({"slow": Recorder("slow", calls, 0.02)}, torch.randn(2, 3), runs=1000, limit_s=0.05)
    assert len(calls) < 10 and times["slow"] >= 0.02


def test_latency_is_the_median_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def model(x: Tensor) -> None:
        seen.append(torch.get_num_threads())

    assert latency_s(model, torch.randn(2, 3), runs=3, warmup=0, threads=1) < 0.1
    assert seen == [1, 1, 1] and torch.get_num_threads() == before
    with pytest.raises(SpeedupError, match="nothing to time"):
        latencies_s({}, torch.randn(2, 3))


@pytest.mark.parametrize("flags, vnni", [("sse avx2", False), ("avx2 avx512_vnni", True), ("avx_vnni", True)])
def test_cpu_info(flags: str, vnni: bool) -> None:
    block = f"processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nflags\t\t: {flags}\n"
    name, found = parse_cpu_info(f"{block}\n{block}")
    assert name == "Some CPU @ 2.0GHz"
    assert found == frozenset(flags.split())
    assert bool(found & {"avx512_vnni", "avx_vnni"}) is vnni


def test_hardware() -> None:
    machine = hardware()
    assert machine.cpu and machine.threads == torch.get_num_threads()


def test_file_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert file_bytes(tmp_path / "file") == 5
