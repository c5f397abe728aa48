"""What a model costs: multiply-accumulates, parameters, bytes, seconds, and the machine that says so."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raycomp.core.parts import as_call
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, with_batch_size

_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"})
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Hardware:
    """The machine that measured.

    Args:
        cpu: its name.
        vnni: whether it multiplies 8-bit integers without saturation (x86 with VNNI, and ARM).
        threads: how many threads torch uses for one operator.
    """

    cpu: str
    vnni: bool
    threads: int


def hardware() -> Hardware:
    """This machine's CPU, VNNI and number of threads."""
    name, flags = _cpu()
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return Hardware(cpu=name, vnni=arm or bool(flags & _VNNI_FLAGS), threads=torch.get_num_threads())


@lru_cache
def _cpu() -> tuple[str, frozenset[str]]:
    try:
        text = _CPU_INFO.read_text()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    return parse_cpu_info(text)


def parse_cpu_info(text: str) -> tuple[str, frozenset[str]]:
    """The name and the flags of the first processor in the text of `/proc/cpuinfo`."""
    fields = dict(reversed([_field(line) for line in text.split("\n\n")[0].splitlines()]))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(fields.get("flags", "").split())


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def count_parameters(model: nn.Module) -> int:
    """The number of parameters; one that several modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def latency_s(
    model: Callable[..., Any],
    example: Example,
    batch_size: int = 1,
    runs: int = 50,
    *,
    warmup: int = 5,
    threads: int | None = None,
) -> float:
    """The median time of one call in seconds, after warm-up calls; models in train mode are the caller's concern.

    Args:
        model: what is called with the example's arguments.
        example: its samples are repeated up to `batch_size`.
        batch_size: samples per call.
        runs: timed calls.
        warmup: calls before them.
        threads: torch's threads during the calls; None leaves them. ONNX Runtime has its own (`as_module(threads=)`).
    """
    timed = latencies_s({"model": model}, example, batch_size, runs, warmup=warmup, threads=threads)
    return timed["model"]


def latencies_s(
    models: Mapping[str, Callable[..., Any]],
    example: Example,
    batch_size: int = 1,
    runs: int = 50,
    *,
    warmup: int = 5,
    threads: int | None = None,
    limit_s: float = math.inf,
) -> dict[str, float]:
    """Like `latency_s` for several models, called in turn (A B C A B C), so that the machine's moods hit all alike.

    Args:
        limit_s: no turn is begun after this time, warm-up included; where it ends the warm-up, the last turn counts.

    Returns:
        the median seconds of each model.
    """
    if not models or runs < 1:
        raise SpeedupError(f"nothing to time: {len(models)} models, {runs} runs")
    args, kwargs = as_call(with_batch_size(example, batch_size))
    times: dict[str, list[float]] = {name: [] for name in models}
    before, begun = torch.get_num_threads(), time.perf_counter()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.no_grad():
            for run in range(warmup + runs):
                if run and time.perf_counter() - begun > limit_s:
                    break
                for name, model in models.items():
                    start = time.perf_counter()
                    model(*args, **kwargs)
                    _wait(args, kwargs)
                    times[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return {name: statistics.median(seconds[warmup:] or seconds[-1:]) for name, seconds in times.items()}


def _wait(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(isinstance(value, torch.Tensor) and value.is_cuda for value in (*args, *kwargs.values())):
        torch.cuda.synchronize()


def file_bytes(path: str | os.PathLike[str]) -> int:
    """The size of a file."""
    return Path(path).stat().st_size
