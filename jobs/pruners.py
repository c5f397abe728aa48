"""Every pruner on Fashion-MNIST under the same budgets, with the same short training after it.

python jobs/pruners.py --seeds 3    # a ResNet-20 at 50 % and 25 % of its multiply-accumulates
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from raycomp.config import JobConfig, parse_job
from raycomp.deploy.measure import latencies_s
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.search import search_stage
from raycomp.pipeline.stage import StageStart, finish_stage, resolve_start, stage_chain
from raycomp.pipeline.task import Task, data_made_once, given_data, prepare_task
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.training.loop import StageTraining
from raycomp.pipeline.training.metrics import evaluate
from raycomp.results.progress import ProgressEvent
from raycomp.speedup.graph.macs import count_macs
from raycomp.storage import scratch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXAMPLE = torch.zeros(2, 1, 28, 28)
Settings = dict[str, Any]


def pruners(budget: Settings) -> dict[str, Settings]:
    """The settings of every pruner; those whose saliencies compare over layers rank over all of them."""
    even = [{"op_types": ["Conv2d"], "granularity": "out_channel", "budget": budget}]
    ranked = [{**even[0], "global_group_id": "all"}]
    norms = [{"op_types": ["BatchNorm2d"], "budget": budget, "global_group_id": "all"}]
    l1 = {"type": "L1NormPruner", "config_list": even}
    return {
        "RandomPruner": {"config_list": even},
        "LevelPruner": {"config_list": even},
        "L1NormPruner": {"config_list": even},
        "L2NormPruner": {"config_list": even},
        "FPGMPruner": {"config_list": even},
        "LAMPPruner": {"config_list": ranked},
        "GroupNormPruner": {"config_list": even},
        "ActivationAPoZRankPruner": {"config_list": even, "training_steps": 20},
        "ActivationMeanRankPruner": {"config_list": even, "training_steps": 20},
        "TaylorPruner": {"config_list": ranked, "training_steps": 40},
        "GroupTaylorPruner": {"config_list": ranked, "training_steps": 40},
        "SlimPruner": {"config_list": norms, "training_steps": 80, "regular_scale": 0.1},
        "MovementPruner": {"config_list": even, "warmup_step": 20, "cooldown_begin_step": 120},
        "ADMMPruner": {"config_list": even, "iterations": 2, "training_epochs": 1, "rho": 1e-2},
        "LinearPruner": {"pruner": l1, "interval_steps": 10, "total_times": 10},
        "AGPPruner": {"pruner": l1, "interval_steps": 10, "total_times": 10},
        "LotteryTicketPruner": {"pruner": l1, "total_iteration": 2, "reset_weight": False},
        "SimulatedAnnealingPruner": {"pruner": l1},
        "AMCPruner": {"pruner": l1, "total_episode": 120},
        "AutoCompressPruner": {
            "pruner": {"type": "ADMMPruner", "config_list": even, "iterations": 1, "rho": 1e-2},
            "total_iteration": 2,
            "cool_down_rate": 0.7,
        },
    }


@dataclass(frozen=True)
class Row:
    """One pruner's result: accuracies in percent, MACs and latency as parts of the dense model's."""

    pruner: str
    left: float
    seed: int
    dense: float
    accuracy: float
    macs: float
    latency: float


class _Last:
    """Keeps a stage's last state."""

    state: StageState

    def progress(self, event: ProgressEvent) -> None:
        """Not shown."""

    def checkpoint(self, make: Callable[[], StageState], metrics: dict[str, float]) -> None:
        self.state = make()


@click.command()
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=10_000, show_default=True, help="Training images.")
@click.option("--epochs", default=3, show_default=True, help="Of the training with, and after, the pruner.")
@click.option("--dense-epochs", default=12, show_default=True, help="Of the dense model's training.")
@click.option("--only", multiple=True, help="These pruners alone.")
@click.option("--left", multiple=True, type=float, default=(0.5, 0.25), show_default=True, help="Parts of the MACs.")
@click.option("--rows", default=None, help="A file of rows: those that are there aren't measured again.")
def main(
    seeds: int,
    samples: int,
    epochs: int,
    dense_epochs: int,
    only: tuple[str, ...],
    left: tuple[float, ...],
    rows: str | None,
) -> None:
    """Accuracy, MACs and latency of every pruner under the same budgets."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    file = Path(rows or "pruners.jsonl")
    found = [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row.pruner, row.left, row.seed) for row in found}
    arguments = {"blocks": 3, "epochs": dense_epochs, "train_samples": samples, "teacher_blocks": 3}
    for seed in range(seeds):
        for part in left:
            for name, settings in pruners({"macs": part}).items():
                if (name, part, seed) in done or (only and name not in only):
                    continue
                job = _job({"type": name, **settings}, {**arguments, "seed": seed}, epochs, seed)
                row = Row(name, part, seed, **_measured(job))
                found.append(row)
                with file.open("a") as stream:
                    stream.write(json.dumps(asdict(row)) + "\n")
                Console().print(row)
    Console().print(_table(found))


def _job(pruner: Mapping[str, Any], arguments: Mapping[str, Any], epochs: int, seed: int) -> JobConfig:
    raw = {
        "name": "pruners",
        "task": {"entrypoint": f"{EXAMPLES / 'fashion_mnist.py'}:FashionMnist", "arguments": dict(arguments)},
        "stages": [{"name": "prune", "compressors": [dict(pruner)]}],
        "training": {"global_batch_size": 128, "epochs": epochs, "seed": seed},
    }
    return parse_job(raw)


def _measured(job: JobConfig) -> dict[str, float]:
    with scratch() as folder, data_made_once():
        task = build_task(job.task)
        prepare_task(task, folder)
        dense = task.model().eval()
        for start in _stages(job, task):
            model = start.model(task, job.training.seed).eval()
        seconds = latencies_s({"dense": dense, "pruned": model}, EXAMPLE, batch_size=32, runs=30)
        return {
            "dense": _accuracy(task, dense),
            "accuracy": _accuracy(task, model),
            "macs": count_macs(model, EXAMPLE) / count_macs(dense, EXAMPLE),
            "latency": seconds["pruned"] / seconds["dense"],
        }


def _stages(job: JobConfig, task: Task) -> Iterator[StageStart]:
    """Where each stage ends."""
    start = StageStart()
    for index, stage in enumerate(job.stages):
        resolved, _ = search_stage(job, index, task, start, resolve_start(job, index, task, start))
        keeper = _Last()
        StageTraining(
            name=stage.name,
            task=task,
            chain=stage_chain(job, index, task, start, resolved),
            training=job.training_for(stage),
            evaluation=job.evaluation,
            listener=keeper,
            device=torch.device("cpu"),
        ).run()
        start = finish_stage(job, index, task, start, resolved, keeper.state).next_start()
        yield start


def _accuracy(task: Task, model: torch.nn.Module) -> float:
    found = evaluate(task, model, given_data(task, "eval"), batch_size=1000)
    return 100 * next(iter(found.values()))


def _table(rows: list[Row]) -> Table:
    table = Table("pruner", "MACs left", "accuracy %", "of dense", "MACs", "latency, batch 32")
    for left in sorted({row.left for row in rows}, reverse=True):
        for name in dict.fromkeys(row.pruner for row in rows):
            mine = [row for row in rows if (row.pruner, row.left) == (name, left)]
            if mine:
                accuracies = [row.accuracy for row in mine]
                spread = statistics.stdev(accuracies) if len(mine) > 1 else 0.0
                table.add_row(
                    name,
                    f"{left:.0%}",
                    f"{statistics.mean(accuracies):.2f} ± {spread:.2f}",
                    f"{statistics.mean(row.accuracy - row.dense for row in mine):+.2f}",
                    f"{statistics.mean(row.macs for row in mine):.3f}",
                    f"{statistics.mean(row.latency for row in mine):.2f}",
                )
    return table


if __name__ == "__main__":
    main()
