"""The number of workers changes nothing: a job on 1, 2 and 4 ranks, with data that can't be shared out evenly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from raycomp import TorchEvaluator
from raycomp.pruning import AGPPruner, TaylorPruner
from raycomp.quantization import QATQuantizer
from tests.contracts import tiny
from tests.contracts.training import Trained, assert_close, assert_same, difference, differing, train_on, trained
from tests.pipeline.ranks import on_ranks

WORLDS = (1, 2, 4)
STILL = {"learning_rate": 0.0}
LARGER = {"samples": 209}

VALUES = [{"op_types": ["ReLU"], "target_names": ["_output_"], "sparse_ratio": 0.5}]

JOBS: dict[str, dict[str, Any]] = {
    **{
        f"{kind} of outputs": tiny.job(
            {"type": kind, "config_list": VALUES, **settings}, tiny.quantizer(0), arguments=STILL, steps=4
        )
        for kind, settings in {
            "L1NormPruner": {"training_steps": 3},
            "TaylorPruner": {"training_steps": 3},
            "ActivationMeanRankPruner": {"training_steps": 3},
            "MovementPruner": {"warmup_step": 1, "cooldown_begin_step": 3},
        }.items()
    },
    # A learning rate of 0 keeps the weights, so every decision of every worker count is made from the same ones.
    "decisions": tiny.job(tiny.scheduled_pruner(3, 3), tiny.quantizer(4), tiny.distiller(), arguments=STILL, steps=12),
    "L1 decision": tiny.job(tiny.pruner("L1NormPruner"), tiny.quantizer(0), arguments=STILL, steps=4),
    "float64": tiny.job(arguments=LARGER, steps=104, precision="float64"),
    "float64 in micro-batches": tiny.job(steps=16, precision="float64", gradient_accumulation=4),
    "float32": tiny.job(tiny.scheduled_pruner(3, 4), tiny.quantizer(4), tiny.distiller(), steps=16),
    "own batch norms": tiny.job(
        tiny.scheduled_pruner(3, 4),
        tiny.quantizer(4),
        tiny.distiller(),
        steps=16,
        sync_batch_norm=False,
        gradient_accumulation=4,
    ),
}

Runs = dict[int, dict[str, list[Trained]]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """{workers: {job: what each rank holds}}."""
    alone = {name: [trained(job)] for name, job in JOBS.items()}
    return {1: alone, **{world: train_on(world, JOBS) for world in WORLDS[1:]}}


def test_the_decisions_are_real(runs: Runs) -> None:
    """What follows would say nothing of masks without zeros, constant links, or ranks that agree by themselves."""
    alone = runs[1]["decisions"][0]
    assert all(mask.mean() == 0.5 for mask in alone.masks.values())
    assert len(alone.scales) > 30
    # With 1 of 49 samples left for the last batch of an epoch, three of four ranks are idle in it.
    assert any(choice.idle for choice in runs[4]["decisions"][3].links)
    links = runs[1]["float64"][0].links
    assert {choice.taken for choice in links if choice.target.startswith("relu2")} == {0, 1}
    assert any(choice.own != choice.taken for rank in runs[4]["float32"] for choice in rank.links)
    assert all(mask.mean() == 0.5 for mask in runs[1]["float64"][0].masks.values())


@pytest.mark.parametrize("job", [name for name in JOBS if "decision" in name or "outputs" in name])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_decisions_from_the_same_weights_are_the_same(runs: Runs, world: int, job: str) -> None:
    alone, ranks = runs[1][job][0], runs[world][job]
    assert differing(ranks[0].masks, alone.masks) == []
    assert difference(ranks[0].scales, alone.scales) <= 1e-6
    assert [choice.taken for choice in ranks[0].links] == [choice.taken for choice in alone.links]


@pytest.mark.parametrize("job", ["float64", "float64 in micro-batches"])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_whole_job_in_float64_ends_the_same(runs: Runs, world: int, job: str) -> None:
    alone, ranks = runs[1][job][0], runs[world][job]
    assert_close(ranks[0], alone)
    assert ranks[0].metrics == pytest.approx(alone.metrics, abs=1e-12)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_every_rank_holds_the_same_bits(runs: Runs, world: int, job: str) -> None:
    first, *others = runs[world][job]
    for rank in others:
        assert_same(rank, first)
        assert [choice.taken for choice in rank.links] == [choice.taken for choice in first.links]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_the_same_job_on_as_many_workers_is_the_same_to_the_bit(runs: Runs, world: int) -> None:
    again = train_on(world, {"again": JOBS["own batch norms"]})["again"]
    assert_same(again[0], runs[world]["own batch norms"][0])


class _Script(nn.Module):
    """What a user's own script may train, without batch norm, so that halves of a batch make up the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x)).mean(dim=(2, 3)))


def _script(rank: int, world: int, micro_batches: int) -> dict[str, Any]:
    """A script as one writes it for torchrun: its own loop wraps the model in DDP and reads its part of each batch."""
    torch.manual_seed(0)
    model = _Script()
    optimizer = SGD(model.parameters(), lr=0.0)
    images, labels = tiny.Tiny(64).train_data().tensors

    def train(
        model: nn.Module, optimizer: Optimizer, training_step: Any, schedulers: Any, max_steps: int, max_epochs: None
    ) -> None:
        parallel = DistributedDataParallel(model) if world > 1 else model
        for step in range(max_steps):
            optimizer.zero_grad()
            whole = torch.arange(64).roll(step)[:32]
            for part in whole[rank::world].chunk(micro_batches):
                (training_step((images[part], labels[part]), parallel) / micro_batches).backward()
            optimizer.step()

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    evaluator = TorchEvaluator(train, optimizer, training_step)
    taylor = TaylorPruner(model, [{"op_names": ["conv"], "sparse_ratio": 0.5}], evaluator, 3)
    pruner = AGPPruner(taylor, 3, 2)
    activations = {"op_types": ["ReLU"], "target_names": ["_output_"], "quant_dtype": "uint8"}
    weights = {"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "granularity": "out_channel"}
    quantizer = QATQuantizer.from_compressor(taylor, [activations, weights], 2)
    quantizer.compress(max_steps=8)
    scales = {
        f"{name}.{key}": values["scale"].numpy()
        for name, targets in quantizer.get_calibration_config().items()
        for key, values in targets.items()
    }
    return {"masks": {"conv": pruner.get_masks()["conv"]["weight"].numpy()}, "scales": scales}


def _scripts(rank: int, world: int) -> dict[str, Any]:
    return {"whole batches": _script(rank, world, 1), "micro-batches": _script(rank, world, 2)}


def test_a_script_with_its_own_loop_under_ddp_decides_as_one_process_does() -> None:
    (alone,) = on_ranks(1, _scripts)
    assert alone["whole batches"]["masks"]["conv"].mean() == 0.5
    for world in WORLDS[1:]:
        ranks = on_ranks(world, _scripts)
        for form, expected in alone.items():
            first, *others = [rank[form] for rank in ranks]
            assert differing(first["masks"], expected["masks"]) == []
            assert difference(first["scales"], expected["scales"]) <= 1e-6
            for kind in ("masks", "scales"):
                assert [differing(rank[kind], first[kind]) for rank in others] == [[]] * (world - 1)
