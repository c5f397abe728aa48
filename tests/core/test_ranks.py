"""Under DDP, in a user's own training loop, every rank decides the same, and as one process would."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from raycomp import TorchEvaluator
from raycomp.pruning import TaylorPruner
from raycomp.quantization import QATQuantizer
from tests.pipeline.ranks import on_ranks

STEPS, SAMPLES = 3, 8


def plain_network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def compressed(rank: int, world: int, **goal: Any) -> dict[str, Any]:
    """One script for any number of ranks: each takes its part of the batch, twice per step, as gradients accumulate."""
    model = plain_network().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(model: nn.Module, optimizer: Any, step: Any, schedulers: Any, max_steps: int, max_epochs: Any) -> None:
        wrapped = DistributedDataParallel(model) if world > 1 else model
        for number in range(max_steps):
            generator = torch.Generator().manual_seed(number)
            values = torch.randn(2, SAMPLES, 6, generator=generator, dtype=torch.float64)
            targets = torch.randint(0, 3, (2, SAMPLES), generator=generator)
            optimizer.zero_grad()
            for half in range(2):
                part = slice(rank, None, world)
                step((values[half][part], targets[half][part]), wrapped).backward()
            optimizer.step()

    evaluator = TorchEvaluator(
        train, optimizer, lambda batch, model: functional.cross_entropy(model(batch[0]), batch[1])
    )
    pruner = TaylorPruner(model, [{"op_names": ["0"], **(goal or {"sparse_ratio": 0.5})}], evaluator, training_steps=2)
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_types": ["Linear"], "quant_scheme": "affine"}], 1)
    quantizer.compress(STEPS)
    calibration = {
        f"{module}.{target}": (float(values["scale"]), int(values["zero_point"]))
        for module, targets in quantizer.get_calibration_config().items()
        for target, values in targets.items()
    }
    return {"mask": pruner.get_masks()["0"]["weight"].tolist(), "calibration": calibration}


def test_two_ranks_decide_what_one_process_does() -> None:
    first, second = on_ranks(2, compressed)
    alone = compressed(0, 1)
    assert first == second
    assert first["mask"] == alone["mask"]
    assert sorted({sum(row) for row in alone["mask"]}) == [0, 6]
    assert set(alone["calibration"]) == {
        f"{i}.{t}" for i in (0, 2) for t in ("_input_0", "weight", "bias", "_output_0")
    }
    for name, (scale, zero_point) in alone["calibration"].items():
        assert abs(first["calibration"][name][0] / scale - 1) < 1e-9, name
        assert first["calibration"][name][1] == zero_point, name


def test_a_threshold_means_the_same_on_two_ranks() -> None:
    """Saliencies are about 0.0006, 0.0009, 0.0011, 0.0016, 0.0047…: added up over the ranks, three lie below it."""
    threshold = partial(compressed, sparse_threshold=0.003)
    first, second = on_ranks(2, threshold)
    assert first["mask"] == second["mask"] == threshold(0, 1)["mask"]
    assert [sum(row) for row in first["mask"]].count(0) == 4
