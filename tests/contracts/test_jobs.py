"""What every algorithm owes as a job: any number of workers, any interruption, and a stage that ends well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raycomp.config import COMPRESSORS, Need, parse_job
from raycomp.deploy.int8 import lower_int8
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.preflight import check_stages
from raycomp.pipeline.stage import StageResult, StageStart, real_inputs, resolve_start
from raycomp.pipeline.training.checkpoint import StageState
from tests.contracts import tiny
from tests.contracts.settings import SETTINGS, fused, settings
from tests.contracts.training import (
    Keeper,
    Trained,
    Values,
    assert_close,
    assert_same,
    difference,
    differing,
    finish,
    train_on,
    trained,
)

every_algorithm = pytest.mark.parametrize("name", SETTINGS)
Job = dict[str, Any]


def job(*names: str, **training: Any) -> Job:
    """A job with a stage of these algorithms; 10 steps over epochs of 4, the last of which holds a single sample."""
    return tiny.job(*map(settings, names), **{"steps": 10, "precision": "float64", **training})


CONDITIONS: dict[str, dict[str, Any]] = {
    "in micro-batches": {"gradient_accumulation": 4},
    "checkpointed": {"arguments": {"checkpointing": True}},
    "with a spare layer": {"arguments": {"spare": True}},
    "with norms of its own": {"sync_batch_norm": False},
}


def test_every_algorithm_has_a_row() -> None:
    assert set(SETTINGS) == set(COMPRESSORS)


# Those that decide before the first step, from the weights alone, do under all conditions what one of them does.
WATCHING = [name for name in SETTINGS if COMPRESSORS[name].needs - {Need.SEARCH} or name == "L1NormPruner"]
PLAIN = {
    **{name: job(name) for name in SETTINGS},
    **{f"{name} fused": job(*fused(name)) for name in SETTINGS},
    # The fourth of four ranks never has a sample: what it reduces has the others' shape and dtype all the same.
    **{f"{name} on 3 samples": job(name, arguments={"samples": 3}, steps=6) for name in WATCHING},
}
CONDITIONED = {f"{name} {how}": job(name, **more) for name in WATCHING for how, more in CONDITIONS.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    """What one process makes of each job."""
    return {name: trained(each) for name, each in (PLAIN | CONDITIONED).items()}


@pytest.fixture(scope="module")
def two() -> dict[str, list[Trained]]:
    """What each of two ranks holds."""
    return train_on(2, PLAIN | CONDITIONED)


@pytest.fixture(scope="module")
def four() -> dict[str, list[Trained]]:
    """What each of four ranks holds, three of which are idle in the last batch of an epoch."""
    return train_on(4, PLAIN)


@pytest.mark.parametrize("name", PLAIN | CONDITIONED)
def test_two_workers_do_what_one_does(name: str, alone: dict[str, Trained], two: dict[str, list[Trained]]) -> None:
    assert_same(two[name][1], two[name][0])
    if "norms of its own" not in name:
        assert_close(two[name][0], alone[name])


@pytest.mark.parametrize("name", PLAIN)
def test_four_workers_do_what_one_does(name: str, alone: dict[str, Trained], four: dict[str, list[Trained]]) -> None:
    for other in four[name][1:]:
        assert_same(other, four[name][0])
    assert_close(four[name][0], alone[name])


@pytest.mark.parametrize("name", WATCHING)
def test_recomputing_activations_changes_nothing(name: str, alone: dict[str, Trained]) -> None:
    """Beside the running statistics, in which torch counts a recomputed batch twice, and what PTQ finds with them."""
    recomputed, once = alone[f"{name} checkpointed"], alone[name]
    assert differing(recomputed.masks, once.masks) == []
    assert difference(_trained_alone(recomputed.weights), _trained_alone(once.weights)) <= 1e-9
    if name != "PtqQuantizer":
        assert difference(recomputed.scales, once.scales) <= 1e-9


def _trained_alone(weights: Values) -> Values:
    counted = (
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "scale",
        "zero_point",
        "tracked_min",
        "tracked_max",
    )
    return {name: value for name, value in weights.items() if not name.endswith(counted)}


@every_algorithm
def test_what_is_interrupted_ends_as_if_undisturbed(name: str, tmp_path: Path) -> None:
    """In the midst of a training, and of one in rounds at the end of one and in the midst of another."""
    for together in ((name,), fused(name)):
        raw = job(*together, precision="float32")
        undisturbed = trained(raw)
        for epoch in (1, 2, 3, 5) if Need.ROUNDS in COMPRESSORS[name].needs else (1, 2):
            folder = tmp_path / f"{len(together)}-{epoch}"
            trained(raw, Keeper(folder, end_after=epoch))
            metrics = StageState.load(folder).history[-1].metrics
            # A training that was over when it was interrupted, as a calibration's is, takes no metrics any more.
            assert_same(trained(raw, Keeper(metrics=metrics), resume=folder), undisturbed)


@every_algorithm
def test_its_stage_is_finished_sped_up_verified_and_lowered(name: str, tmp_path: Path) -> None:
    for together in ((name,), fused(name)):
        raw = job(*together, precision="float32")
        result = finished(raw, tmp_path / str(len(together)))
        pruner = any(COMPRESSORS[each].kind == "pruner" for each in together)
        assert bool(result.masks) == pruner
        if pruner:
            assert result.verification is not None and result.verification.passed
            assert result.model.conv1.weight.shape[0] == 3
        if result.calibration:
            inputs = real_inputs(build_task(parse_job(raw).task), torch.float32, 2)
            assert lower_int8(result.model, result.calibration, result.folds, inputs).weight_bytes > 0


def finished(raw: Job, folder: Path) -> StageResult:
    """What the head node makes of a stage that was trained here; preflight lets the job pass."""
    config = parse_job(raw)
    task = build_task(config.task)
    assert check_stages(config, task).first == resolve_start(config, 0, task, StageStart())
    trained(raw, Keeper(folder))
    return finish(raw, folder)


@every_algorithm
def test_a_job_leaves_its_mark(name: str, alone: dict[str, Trained]) -> None:
    """What the others say would hold of an algorithm that does nothing, too."""
    kind = COMPRESSORS[name].kind
    untouched = trained(job("L1NormPruner"))
    if kind == "pruner":
        weights = [mask for key, mask in alone[name].masks.items() if key.endswith("weight")]
        assert weights and all(mask.mean() == 0.5 for mask in weights)
    if kind == "quantizer":
        assert any(key.endswith("_input_0.scale") for key in alone[name].scales)
    if kind == "distiller":
        common = {key: value for key, value in alone[name].weights.items() if key in untouched.weights}
        assert differing(common, {key: untouched.weights[key] for key in common})
