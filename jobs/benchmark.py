"""What raycomp costs and gives, measured side by side in one run.

python jobs/benchmark.py steps      # step time with compressors against the same DDP loop without
python jobs/benchmark.py masks      # time of all masks of ResNet-50's weights against one topk over them
python jobs/benchmark.py fashion    # Fashion-MNIST at 50 % of channels and int8: with and without distillation
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raycomp import pruning
from raycomp.config import JobConfig, load_job
from raycomp.core.chain import Chain
from raycomp.evaluators.plain import TorchEvaluator
from raycomp.pruning.pruner import Pruner
from raycomp.quantization import QATQuantizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
Step = Callable[[], None]


@click.group()
def main() -> None:
    """Measures raycomp."""


@main.command()
@click.option("--workers", default=2, show_default=True, help="DDP processes (gloo, one thread each).")
@click.option("--batch", default=64, show_default=True, help="Global batch size.")
@click.option("--rounds", default=40, show_default=True, help="Timed steps of each variant.")
def steps(workers: int, batch: int, rounds: int) -> None:
    """Step time of a ResNet-20 on 28 x 28 images: plain, with each pruner that the training takes part in, with QAT."""
    # glibc gives freed memory back after each step or keeps it, as the last small allocation falls; here it keeps it.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_time_steps, (workers, batch, rounds, folder), nprocs=workers)
        times: dict[str, list[float]] = json.loads(Path(folder, "times.json").read_text())
    table = Table("variant", "median ms", "ratio to plain")
    for name, seconds in times.items():
        ratios = [mine / plain for mine, plain in zip(seconds, times["plain"], strict=True)]
        table.add_row(name, f"{1000 * statistics.median(seconds):.1f}", f"{statistics.median(ratios):.2f}")
    Console().print(table)


def _time_steps(rank: int, workers: int, batch: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=workers)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(batch // workers, 1, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (batch // workers,), generator=generator)
    made = {"plain": lambda model: None, **{name: partial(_pruned, name) for name in _TRAINING_AWARE}}
    made |= {"AGPPruner": _scheduled, "QATQuantizer": _quantizer}
    variants = {name: _training(compress, images, labels) for name, compress in made.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 5):
        for name, step in variants.items():
            dist.barrier()
            begun = time.perf_counter()
            step()
            if round_ >= 5:
                times[name].append(time.perf_counter() - begun)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    # No rank takes the connection down while another still uses it, nor while a DDP model holds it.
    del step
    variants.clear()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _training(compress: Callable[[nn.Module], Chain | None], images: Tensor, labels: Tensor) -> Step:
    """One optimizer step of a fresh model in DDP, with the compressors that `compress` attaches."""
    from resnet import ResNet

    torch.manual_seed(0)
    plain = ResNet(16, blocks=3)
    chain = compress(plain)
    model = DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    # Held by the step: a run ends where nobody holds it.
    run = nullcontext() if chain is None else chain.run([optimizer])
    run.__enter__()

    def step(run: AbstractContextManager[None] = run) -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss = loss if chain is None else chain.loss(loss, images)
        loss.backward()
        optimizer.step()

    return step


def _unused(*args: Any) -> None:
    raise RuntimeError("the benchmark runs its own loop")


def _evaluator(model: nn.Module, *size: int) -> TorchEvaluator:
    example = torch.zeros(2, *size)
    return TorchEvaluator(_unused, torch.optim.SGD(model.parameters(), lr=0.1), _unused, dummy_input=example)


_NEVER = 1_000_000
_CHANNELS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
_TRAINING_AWARE: dict[str, dict[str, Any]] = {
    "TaylorPruner": {"training_steps": _NEVER},
    "GroupTaylorPruner": {"training_steps": _NEVER},
    "SlimPruner": {"training_steps": _NEVER, "config_list": [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]},
    "MovementPruner": {"cooldown_begin_step": _NEVER},
    "ADMMPruner": {"iterations": 2},
    "ActivationAPoZRankPruner": {"training_steps": _NEVER},
    "ActivationMeanRankPruner": {"training_steps": _NEVER},
}


def _pruned(name: str, model: nn.Module) -> Chain:
    settings = {"config_list": _CHANNELS, **_TRAINING_AWARE[name]}
    pruner: Pruner = getattr(pruning, name)(model, evaluator=_evaluator(model, 1, 28, 28), **settings)
    return pruner.chain


def _scheduled(model: nn.Module) -> Chain:
    taylor = pruning.TaylorPruner(model, _CHANNELS, _evaluator(model, 1, 28, 28), training_steps=5)
    return pruning.AGPPruner(taylor, interval_steps=5, total_times=_NEVER).pruner.chain


def _quantizer(model: nn.Module) -> Chain:
    stages = load_job(EXAMPLES / "fashion.yaml").stages
    settings = next(item for item in stages[0].compressors if item.type == "QATQuantizer")
    return QATQuantizer(model, settings.config_list, _evaluator(model, 1, 28, 28)).chain


@main.command()
@click.option("--rounds", default=5, show_default=True, help="Timed decisions of each variant.")
def masks(rounds: int) -> None:
    """Time of all masks of ResNet-50's 25 million weights, from the weights on, against one topk and one sort."""
    torch.set_num_threads(1)
    weights = torch.cat([parameter.detach().abs().flatten() for parameter in _resnet50().parameters()])
    everywhere = [{**_CHANNELS[0], "global_group_id": "all"}]
    budget = [{"op_types": ["Conv2d"], "budget": {"macs": 0.5}, "global_group_id": "all"}]
    variants: dict[str, Step] = {
        "topk": lambda: _discard(weights.topk(len(weights) // 2, sorted=False)),
        "sort": lambda: _discard(weights.sort()),
        "L1NormPruner": _decision(pruning.L1NormPruner, _CHANNELS),
        "L1NormPruner, budget": _decision(pruning.L1NormPruner, budget),
        "LevelPruner": _decision(pruning.LevelPruner, _CHANNELS),
        "LevelPruner, one global group": _decision(pruning.LevelPruner, everywhere),
        "LAMPPruner": _decision(pruning.LAMPPruner, _CHANNELS),
        "FPGMPruner": _decision(pruning.FPGMPruner, _CHANNELS),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, decide in variants.items():
            begun = time.perf_counter()
            decide()
            if round_:
                times[name].append(time.perf_counter() - begun)
    table = Table("variant", "median ms", "ratio to topk", "ratio to sort")
    for name, seconds in times.items():
        found = [statistics.median(map(_ratio, seconds, times[other])) for other in ("topk", "sort")]
        table.add_row(name, f"{1000 * statistics.median(seconds):.0f}", *(f"{ratio:.2f}" for ratio in found))
    Console().print(table)


def _ratio(mine: float, other: float) -> float:
    return mine / other


def _discard(value: object) -> None:
    """Only the time counts."""


def _decision(kind: type[Pruner], config_list: list[dict[str, Any]]) -> Step:
    """All masks of a fresh ResNet-50, made anew each time."""
    model = _resnet50()
    pruner = kind(model, config_list, _evaluator(model, 3, 64, 64))

    def decide() -> None:
        for mask in pruner.masks.values():
            mask.mask.fill_(1.0)
        pruner.set_masks(pruner.saliencies(), 1.0)

    return decide


class _Bottleneck(nn.Module):
    """ResNet-50's block (He et al., arXiv:1512.03385) without its norms, which hold few of the weights."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        is_same = stride == 1 and inputs == 4 * width
        self.projection = nn.Identity() if is_same else nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(torch.relu(self.conv1(x)))
        return torch.relu(self.conv3(torch.relu(inner)) + self.projection(x))


def _resnet50() -> nn.Module:
    torch.manual_seed(0)
    blocks, inputs = [], 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for index in range(count):
            blocks.append(_Bottleneck(inputs, width, 2 if stage and not index else 1))
            inputs = 4 * width
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


@dataclass(frozen=True)
class Row:
    """One job's result on Fashion-MNIST, accuracies in percent."""

    seed: int
    distilled: bool
    dense: float
    simulated: float
    int8: float
    macs: float
    training_s: float
    rest_s: float


@main.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=6, show_default=True, help="Of the compression.")
@click.option("--storage", default="artifacts", show_default=True, help="Where the artifacts go.")
@click.option("--samples", default=None, type=int, help="Use the first so many training images alone.")
def fashion(seeds: int, epochs: int, storage: str, samples: int | None) -> None:
    """Fashion-MNIST at 50 % of channels and int8, the same budget with and without distillation."""
    from raycomp.distributed.cluster import connect

    job = load_job(EXAMPLES / "fashion.yaml")
    rows = []
    with connect(job):
        for seed in range(seeds):
            for distilled in (True, False):
                rows.append(_run(_variant(job, seed, distilled, epochs, storage, samples), seed, distilled))
                Console().print(rows[-1])
    Console().print(_fashion_table(rows))


def _variant(job: JobConfig, seed: int, distilled: bool, epochs: int, storage: str, samples: int | None) -> JobConfig:
    raw = job.model_dump(mode="json", by_alias=True)
    raw["name"] = f"fashion-{seed}-{'distilled' if distilled else 'alone'}"
    raw["storage"]["uri"] = storage
    raw["task"]["arguments"] |= {"seed": seed, **({"train_samples": samples} if samples else {})}
    raw["training"] |= {"seed": seed, "epochs": epochs}
    if not distilled:
        stage = raw["stages"][0]
        stage["compressors"] = [item for item in stage["compressors"] if "Distiller" not in item["type"]]
    return JobConfig.model_validate(raw)


def _run(job: JobConfig, seed: int, distilled: bool) -> Row:
    from raycomp import CompressionJob
    from raycomp.report.progress import ProgressPrinter

    with ProgressPrinter(every_s=60) as progress:
        result = CompressionJob(job, base_dir=EXAMPLES).fit(progress=progress)
    models = {row.name: row for row in result.summary.models}
    accuracy = {name: 100 * row.metrics["accuracy"] for name, row in models.items()}
    timings = result.summary.timings
    return Row(
        seed,
        distilled,
        accuracy["dense"],
        accuracy["simulated"],
        accuracy["int8"],
        (models["sped-up"].macs or 0) / (models["dense"].macs or 1),
        timings["train"],
        sum(timings.values()) - timings["train"],
    )


def _fashion_table(rows: list[Row]) -> Table:
    table = Table("seed", "distilled", "dense %", "simulated %", "int8 %", "int8 - dense", "MACs", "train s", "rest s")
    for row in rows:
        table.add_row(*_cells(str(row.seed), row))
    for distilled in (True, False):
        mine = [row for row in rows if row.distilled is distilled]
        mean = replace(
            mine[0],
            **{
                name: statistics.mean(getattr(row, name) for row in mine)
                for name in ("dense", "simulated", "int8", "macs", "training_s", "rest_s")
            },
        )
        table.add_row(*_cells("mean", mean), style="bold")
    return table


def _cells(seed: str, row: Row) -> list[str]:
    figures = [row.dense, row.simulated, row.int8]
    shown = [f"{value:.2f}" for value in figures]
    difference = f"{row.int8 - row.dense:+.2f}"
    return [
        seed,
        "yes" if row.distilled else "no",
        *shown,
        difference,
        f"{row.macs:.3f}",
        f"{row.training_s:.0f}",
        f"{row.rest_s:.0f}",
    ]


if __name__ == "__main__":
    main()
