"""Measures every form of a model: metric, parameters, MACs, size, latency, and int8 against its simulation."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.config import JobConfig
from raycomp.core.masks import Masks
from raycomp.core.parts import as_call
from raycomp.core.selection import module_names
from raycomp.deploy.int8 import Int8Model, sqnr_db
from raycomp.deploy.measure import count_macs, count_parameters, hardware, latencies_s
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.onnx_runtime import load_onnx
from raycomp.errors import SpeedupError
from raycomp.pipeline.stage import StageResult, real_inputs
from raycomp.pipeline.task import Task, given
from raycomp.pipeline.training.metrics import evaluate
from raycomp.results.summary import Int8Figures, LayerFigures, ModelFigures
from raycomp.speedup.graph.example import describe, flatten
from raycomp.storage import save_tensors

_SQNR_SAMPLES = 256


@dataclass(frozen=True)
class Forms:
    """The forms of one model; `masked` is the plain model below `simulated`, `int8` is there if it was made."""

    dense: nn.Module
    simulated: nn.Module
    masked: nn.Module
    sped_up: nn.Module
    int8: Int8Model | None


def model_figures(job: JobConfig, task: Task, forms: Forms) -> tuple[tuple[ModelFigures, ...], str, tuple[str, ...]]:
    """One row per form; what their latencies are of; and what could not be measured as it should."""
    modules = {"dense": forms.dense, "simulated": forms.simulated, "sped-up": forms.sped_up}
    plain = {"dense": forms.dense, "simulated": forms.masked, "sped-up": forms.sped_up, "int8": forms.sped_up}
    sizes = {name: _stored_bytes(plain[name]) for name in modules}
    if forms.int8 is not None:
        modules["int8"] = forms.int8.as_module(threads=1)
        sizes["int8"] = len(forms.int8.onnx)
    timed, timed_how, notes = _timed(task, modules)
    example = _single(real_inputs(task, torch.float32))
    latency = {
        str(size): _latencies_s(timed, example, size, job.evaluation.latency_runs)
        for size in (1, job.evaluation.latency_batch_size)
    }
    rows = tuple(
        ModelFigures(
            name,
            _metrics(job, task, module),
            count_parameters(plain[name]),
            _macs(plain[name], task),
            sizes[name],
            {size: seconds[name] for size, seconds in latency.items()},
        )
        for name, module in modules.items()
    )
    return rows, timed_how, notes


def int8_figures(task: Task, result: StageResult, int8: Int8Model, rows: tuple[ModelFigures, ...]) -> Int8Figures:
    """The int8 model's outputs and metric against those of the simulated model."""
    inputs = real_inputs(task, torch.float32, _SQNR_SAMPLES)
    simulated, real = _outputs(result.simulated, inputs), _outputs(int8.as_module(threads=1), inputs)
    by_name = {row.name: row for row in rows}
    metric = next(iter(by_name["simulated"].metrics))
    return Int8Figures(
        sqnr_db=sqnr_db(simulated, real),
        metric_difference=by_name["int8"].metrics[metric] - by_name["simulated"].metrics[metric],
        weight_bytes=int8.weight_bytes,
        float_weight_bytes=int8.float_weight_bytes,
        vnni=int8.vnni,
        reduce_range=int8.reduce_range,
    )


def layer_figures(dense: nn.Module, masks: Masks, final: StageResult) -> tuple[LayerFigures, ...]:
    """Each layer that was masked or quantized: its weight's shape before and after."""
    modules = dict(final.model.named_modules())
    rows = []
    for name, kind in module_names(dense).items():
        weight = dense.get_submodule(name)._parameters.get("weight")
        mask = masks.get(name, {}).get("weight")
        quantized = final.calibration.get(name, {}).get("weight")
        if weight is None or (mask is None and quantized is None):
            continue
        after = getattr(modules.get(name), "weight", weight)
        sparsity = 1 - int(after.count_nonzero()) / weight.numel()
        dtype = None if quantized is None else quantized["quant_dtype"]
        rows.append(LayerFigures(name, kind, tuple(weight.shape), tuple(after.shape), sparsity, dtype))
    return tuple(rows)


def environment() -> dict[str, str]:
    """What the figures stand on."""
    machine = hardware()
    packages = {name: version(name) for name in ("torch", "pyarrow", "safetensors")}
    return {
        "python": platform.python_version(),
        **packages,
        "processor": machine.cpu,
        "vnni": str(machine.vnni).lower(),
    }


def _metrics(job: JobConfig, task: Task, module: nn.Module) -> dict[str, float]:
    dtype = _dtype(module)
    evaluation = job.evaluation
    return evaluate(
        task,
        module,
        given(task, "eval_data"),
        batch_size=evaluation.batch_size,
        dtype=dtype,
        max_samples=evaluation.max_samples,
    )


def _timed(task: Task, modules: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], str, tuple[str, ...]]:
    """The modules to time: all but the simulation in ONNX Runtime, so that int8 and float stand on equal terms."""
    timed = {**modules, "simulated": _Float32(modules["simulated"])}
    inputs = real_inputs(task, torch.float32, 2)
    with TemporaryDirectory() as folder:
        for name in ("dense", "sped-up"):
            path = Path(folder) / f"{name}.onnx"
            try:
                export_onnx(modules[name], inputs, path)
            except SpeedupError as error:
                timed |= {name: _Float32(modules[name]) for name in ("dense", "sped-up")}
                note = f"the float models are timed in PyTorch, the int8 one in ONNX Runtime: {error}"
                return timed, "PyTorch, one thread; int8: ONNX Runtime", (note,)
            timed[name] = load_onnx(path, threads=1)
    return timed, "ONNX Runtime, one thread; simulated: PyTorch", ()


def _latencies_s(timed: Mapping[str, nn.Module], example: Any, size: int, runs: int) -> dict[str, float]:
    """The simulation apart from the others: it would leave a cold cache to whichever comes after it."""
    alone = {"simulated": timed["simulated"]}
    others = {name: module for name, module in timed.items() if name not in alone}
    return {
        name: seconds
        for group in (others, alone)
        for name, seconds in latencies_s(group, example, size, runs, threads=1).items()
    }


class _Float32(nn.Module):
    """Runs a model of any dtype on float32 inputs, as the others are timed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.eval()
        self.dtype = _dtype(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""

        def cast(value: Any) -> Any:
            return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return self.module(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})


def _outputs(module: nn.Module, inputs: Any) -> Tensor:
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        output = _Float32(module)(*args, **kwargs)
    return torch.cat([value.flatten().float() for value in flatten(describe(output), output)])


def _dtype(module: nn.Module) -> torch.dtype:
    """What the weights are in; float32 where there are none (ONNX Runtime)."""
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)


def _single(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, dict):
        return {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return tuple(value[:1] if isinstance(value, Tensor) else value for value in inputs)


def _macs(module: nn.Module, task: Task) -> int:
    return count_macs(module, real_inputs(task, _dtype(module), 1))


def _stored_bytes(module: nn.Module) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_tensors(path, dict(module.state_dict()))
        return path.stat().st_size
