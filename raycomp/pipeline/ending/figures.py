"""Measures every form of a model: metric, parameters, MACs, size, latency, and int8 against its simulation."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.config import JobConfig
from raycomp.core.masks import Masks
from raycomp.core.model import evaluation_mode
from raycomp.core.parts import as_call
from raycomp.core.seeds import restored_generators
from raycomp.core.selection import module_names
from raycomp.deploy.int8 import Int8Model, sqnr_db
from raycomp.deploy.measure import count_parameters, hardware, latencies_s
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.onnx_runtime import load_onnx
from raycomp.pipeline.data.structure import move_batch
from raycomp.pipeline.inputs import real_inputs
from raycomp.pipeline.notes import Notes
from raycomp.pipeline.stage import StageResult
from raycomp.pipeline.task import Task, given_data
from raycomp.pipeline.training.metrics import Tally, View, evaluation_batches
from raycomp.results.summary import Int8Figures, LayerFigures, ModelFigures, Simulation
from raycomp.speedup import draws
from raycomp.speedup.graph.example import describe, flatten
from raycomp.speedup.graph.macs import count_macs
from raycomp.storage import save_tensors

Outputs = Mapping[str, Future[Tensor]]
_ROUNDING = ("simulated", "sped-up simulated", "int8")
_SQNR_SAMPLES = 256
_TIMING_S = 5.0
"""How long the forms are timed with one batch size, in turn; the simulation apart from them is run once."""
_WARM_UP = 2


@dataclass(frozen=True)
class Forms:
    """The forms of one model, in the order and by the words of `raycomp.results.summary.FORMS`.

    Args:
        dense: as it was.
        masked: under masks alone; None where nothing is quantized, and what trained is this.
        simulated: what trained.
        committed: the plain model below these two.
        sped_up: cut.
        sped_up_simulated: cut, on the grids that training learned; None where there are none.
        int8: in integers; None where it was not made.
    """

    dense: nn.Module
    masked: nn.Module | None
    simulated: nn.Module
    committed: nn.Module
    sped_up: nn.Module
    sped_up_simulated: nn.Module | None
    int8: Int8Model | None

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The forms by their names, as modules to run."""
        modules = {
            "dense": self.dense,
            "masked": self.masked,
            "simulated": self.simulated,
            "sped-up": self.sped_up,
            "sped-up simulated": self.sped_up_simulated,
            "int8": None if self.int8 is None else self.int8.as_module(threads=1),
        }
        return {name: module for name, module in modules.items() if module is not None}

    @cached_property
    def plain(self) -> dict[str, nn.Module]:
        """The model below each form, whose parameters and multiply-accumulates it has."""
        return {
            "dense": self.dense,
            **dict.fromkeys(("masked", "simulated"), self.committed),
            **dict.fromkeys(("sped-up", "sped-up simulated", "int8"), self.sped_up),
        }


def model_figures(
    job: JobConfig, task: Task, forms: Forms, example: Any, sped_up_onnx: Path, notes: Notes
) -> tuple[tuple[ModelFigures, ...], str]:
    """One row per form, and what their latencies are of. What can't be measured is left out, and a note says so.

    Args:
        job: the job.
        task: the user's.
        forms: the forms.
        example: an input that all of them take.
        sped_up_onnx: the sped-up model's ONNX file, if it could be written.
        notes: hears what could not be measured.
    """
    modules, plain = forms.modules, forms.plain
    metrics: dict[str, dict[str, float]] = {}
    with notes.instead_of("no form is evaluated"):
        metrics = _metrics(job, task, modules, notes)
    macs: dict[str, int] = {}
    sizes = {} if forms.int8 is None else {"int8": len(forms.int8.onnx)}
    for name in modules:
        with notes.instead_of(f"the MACs of the {name} model are not counted"):
            macs[name] = count_macs(plain[name], move_batch(example, "cpu", _dtype(plain[name])))
        with notes.instead_of(f"the size of the {name} model is unknown"):
            sizes.setdefault(name, _stored_bytes(plain[name]))
    latency: dict[str, dict[str, float]] = {name: {} for name in modules}
    timed, timed_how = _timed(modules, example, sped_up_onnx, notes)
    for size in (1, job.evaluation.latency_batch_size):
        for name, seconds in _latencies_s(timed, example, size, job.evaluation.latency_runs, notes).items():
            latency[name][str(size)] = seconds
    rows = [
        ModelFigures(
            name,
            metrics.get(name, {}),
            count_parameters(plain[name]),
            macs.get(name),
            sizes.get(name),
            latency[name],
        )
        for name in modules
    ]
    return tuple(rows), timed_how


def outputs(job: JobConfig, task: Task, forms: Forms) -> dict[str, Future[Tensor]]:
    """What each form that rounds gives for the same inputs, as many at once as fit; one that fails raises where its
    outputs are asked for."""
    wanted = {name: forms.modules[name] for name in _ROUNDING if name in forms.modules}
    inputs = real_inputs(task, torch.float32, _SQNR_SAMPLES)
    with ThreadPoolExecutor(_at_once(job, task, wanted)) as pool:
        return {name: pool.submit(_outputs, module, inputs) for name, module in wanted.items()}


def simulation(forms: Forms, given: Outputs, rows: Sequence[ModelFigures]) -> Simulation | None:
    """The sped-up model with simulated rounding against the simulated one; None where nothing is quantized."""
    if forms.sped_up_simulated is None:
        return None
    return Simulation(*_likeness(given, "sped-up simulated", "simulated", rows))


def int8_figures(forms: Forms, given: Outputs, int8: Int8Model, rows: Sequence[ModelFigures]) -> Int8Figures:
    """The int8 model's outputs and metric against those of the sped-up model with simulated rounding."""
    reference = "simulated" if forms.sped_up_simulated is None else "sped-up simulated"
    likeness, difference = _likeness(given, "int8", reference, rows)
    return Int8Figures(
        sqnr_db=likeness,
        metric_difference=difference,
        weight_bytes=int8.weight_bytes,
        float_weight_bytes=int8.float_weight_bytes,
        vnni=int8.vnni,
        reduce_range=int8.reduce_range,
        layers=len(int8.layers),
        float_layers=int8.float_causes,
    )


def with_metric(job: JobConfig, task: Task, index: int, result: StageResult) -> StageResult:
    """The result of a stage before the last, whose verification says what cutting did to the metric, too."""
    if result.verification is None:
        return result
    stage = job.stages[index].name
    notes = Notes(*result.notes)
    metrics: dict[str, dict[str, float]] = {}
    with notes.instead_of(f"stage {stage}: what cutting did to the metric is not known"):
        metrics = _metrics(job, task, {"masked": result.under_masks, "sped-up": result.model}, notes)
    before, after = (next(iter(metrics.get(name, {}).values()), None) for name in ("masked", "sped-up"))
    difference = None if before is None or after is None else after - before
    found = replace(result.verification, reference="masked", metric_difference=difference, stage=stage)
    return replace(result, verification=found, notes=notes())


def metric_difference(form: str, reference: str, rows: Sequence[ModelFigures]) -> float | None:
    """A form's main metric minus that of another; None where one of them is not known."""
    metrics = {row.name: next(iter(row.metrics.values()), None) for row in rows}
    before, after = metrics.get(reference), metrics.get(form)
    return None if before is None or after is None else after - before


def _likeness(given: Outputs, form: str, reference: str, rows: Sequence[ModelFigures]) -> tuple[float, float | None]:
    """SQNR in dB and metric difference of a form against the one whose function it should have."""
    return sqnr_db(given[reference].result(), given[form].result()), metric_difference(form, reference, rows)


def layer_figures(dense: nn.Module, masks: Masks, final: StageResult) -> tuple[LayerFigures, ...]:
    """Each layer that was masked or quantized: its weight's shape before and after; of one that has no compressed
    weight, those of its other parameters."""
    modules = dict(final.model.named_modules())
    rows = []
    for name, kind in module_names(dense).items():
        scales = final.calibration.get(name, {})
        found = [target for target in dict.fromkeys((*masks.get(name, ()), *scales)) if not target.startswith("_")]
        for target in ["weight"] if "weight" in found else found:
            before = getattr(dense.get_submodule(name), target)
            after = getattr(modules.get(name), target, before)
            sparsity = 1 - int(after.count_nonzero()) / before.numel()
            dtype = scales[target]["quant_dtype"] if target in scales else None
            shown = name if target == "weight" else f"{name}.{target}"
            rows.append(LayerFigures(shown, kind, tuple(before.shape), tuple(after.shape), sparsity, dtype))
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


def _metrics(job: JobConfig, task: Task, modules: Mapping[str, nn.Module], notes: Notes) -> dict[str, dict[str, float]]:
    """Each form's metrics, in one pass over the data: every batch goes through all forms, as many at once as fit."""
    evaluation = job.evaluation
    tallies = {name: Tally(task, module, dtype=_dtype(module)) for name, module in modules.items()}
    data = given_data(task, "eval")
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(evaluation_mode(module))
        stack.enter_context(restored_generators())
        pool = stack.enter_context(ThreadPoolExecutor(_at_once(job, task, modules)))
        begun, seen = time.monotonic(), 0
        for batch, wanted in evaluation_batches(task, data, View(evaluation.batch_size, evaluation.max_samples)):
            if seen and time.monotonic() - begun > evaluation.limit_s:
                notes.say(f"metrics are of the first {seen} samples: evaluation.limit_s is {evaluation.limit_s:g}")
                break
            running = {name: pool.submit(tally.add, batch, wanted) for name, tally in tallies.items()}
            for name, future in running.items():
                with notes.instead_of(f"the {name} model is not evaluated"):
                    future.result()
                    continue
                del tallies[name]
            seen += wanted
    return {name: tally.means() for name, tally in tallies.items()}


def _at_once(job: JobConfig, task: Task, modules: Mapping[str, nn.Module]) -> int:
    """How many forms run at the same time; threads would mix what they draw."""
    first = next(iter(modules.values()), None)
    if first is None or draws(first, real_inputs(task, _dtype(first), 2)):
        return 1
    return max(1, _cores() // job.scaling.threads_per_worker)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _timed(
    modules: Mapping[str, nn.Module], example: Any, sped_up_onnx: Path, notes: Notes
) -> tuple[dict[str, nn.Module], str]:
    """The modules to time: all but the simulation in ONNX Runtime, so that int8 and float stand on equal terms.

    Of the forms that only simulate another, the one that trained stands for all.
    """
    wanted = {name: module for name, module in modules.items() if name not in ("masked", "sped-up simulated")}
    timed = {name: module if name == "int8" else _Float32(module) for name, module in wanted.items()}
    with TemporaryDirectory() as folder, notes.instead_of("the float models are timed in PyTorch"):
        dense = Path(folder) / "dense.onnx"
        export_onnx(modules["dense"], example, dense)
        floats = {"dense": load_onnx(dense, threads=1), "sped-up": load_onnx(sped_up_onnx, threads=1)}
        return {**timed, **floats}, "ONNX Runtime, one thread; simulated: PyTorch, one run"
    return timed, "PyTorch, one thread; int8: ONNX Runtime; simulated: one run"


def _latencies_s(timed: Mapping[str, nn.Module], example: Any, size: int, runs: int, notes: Notes) -> dict[str, float]:
    """The simulation once, apart from the others: it would leave a cold cache to whichever comes after it."""
    found: dict[str, float] = {}
    able = {}
    for name, module in timed.items():
        with notes.instead_of(f"the {name} model is not timed with batches of {size}"):
            # For all but the simulation a rehearsal, so that one that can't run doesn't cost the others their figures.
            found |= latencies_s({name: module}, example, size, 1, warmup=0, threads=1)
            able[name] = module
    others = {name: module for name, module in able.items() if name != "simulated"}
    return found | (
        latencies_s(others, example, size, runs, warmup=_WARM_UP, threads=1, limit_s=_TIMING_S) if others else {}
    )


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


def _stored_bytes(module: nn.Module) -> int:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_tensors(path, dict(module.state_dict()))
        return path.stat().st_size
