"""What a model costs: multiply-accumulates, parameters, bytes, seconds, and the machine that says so."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from raycomp.core.model import evaluation_mode
from raycomp.core.parts import as_call
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, with_batch_size
from raycomp.speedup.graph.program import cause_of, quiet

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


def count_macs(model: nn.Module, example: Example) -> int:
    """Multiply-accumulates of one forward with one sample: of all its convolutions and products of matrices.

    Those within recurrent layers and attention count, too. Additions, norms and activations don't.

    Raises:
        SpeedupError: the model cannot run on the example.
    """
    args, kwargs = as_call(with_batch_size(example, 1))
    counter = _Counter()
    try:
        with evaluation_mode(model), torch.no_grad(), _plain_kernels(), counter:
            model(*args, **kwargs)
    except Exception as error:
        raise SpeedupError(
            f"{type(model).__name__} cannot run on one sample of the example: {cause_of(error)}",
            remedy="the example must be an input of this model, with the batch in dimension 0",
        ) from error
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """Adds up what the operators that run multiply and add; torch's own mode follows modules, which gradients upset."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Recurrent layers and attention as the products they consist of, not as one operator that no counter knows."""
    fused_layers = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with quiet(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_layers)


def _flops_of_vectors(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Of a matrix or vector times a vector."""
    return 2 * math.prod(left)


def _flops_of_added_vectors(_added: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return _flops_of_vectors(left, right)


def _flops_of_added_batches(_added: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * int(right[-1])


def _flops_of_trilinear(first: Any, second: Any, *_: Any, **__: Any) -> int:
    """Of `nn.Bilinear`: like a linear layer on all products of both inputs, each weight once for each sample."""
    return 2 * int(first[0]) * math.prod(second)


_FORMULAS: Mapping[Any, Callable[..., Any]] = {
    **flop_registry,
    **{
        operator: shape_wrapper(formula)
        for operator, formula in {
            torch.ops.aten.mv: _flops_of_vectors,
            torch.ops.aten.dot: _flops_of_vectors,
            torch.ops.aten.vdot: _flops_of_vectors,
            torch.ops.aten.addmv: _flops_of_added_vectors,
            torch.ops.aten.addbmm: _flops_of_added_batches,
            torch.ops.aten._trilinear: _flops_of_trilinear,
        }.items()
    },
}
"""Floating-point operations by operator: torch's, and of products that it lacks."""


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
