"""What every algorithm owes: it trains, it resumes exactly, it is repeatable, and it leaves no trace."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raycomp.config import COMPRESSORS
from raycomp.core.selection import module_names
from raycomp.storage import join_state, load_tensors, save_tensors, split_state
from tests.contracts.scripts import ALGORITHMS, STEPS, Algorithm, Killed, Run, batch_of, network

MIDDLE = 4
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)

DEATHS = [
    pytest.param(algorithm, step, id=f"{algorithm.name} before step {step}")
    for algorithm in ALGORITHMS
    for step in (MIDDLE, STEPS, STEPS + MIDDLE, 2 * STEPS)
    if step < algorithm.rounds * STEPS
]
"""In the midst of a round, and between two rounds."""


def state_of(run: Run) -> dict[str, Any]:
    return {"chain": run.chain.state_dict(), "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}


def through_files(state: Any, folder: Path) -> Any:
    tensors, plain = split_state(state)
    save_tensors(folder / "state.safetensors", tensors)
    return join_state(load_tensors(folder / "state.safetensors"), json.loads(json.dumps(plain)))


def restored(state: Any, algorithm: Algorithm, dtype: torch.dtype) -> Run:
    run = Run(algorithm, dtype)
    run.model.load_state_dict(state["model"])
    run.chain.load_state_dict(state["chain"])
    run.optimizer.load_state_dict(state["optimizer"])
    return run


def assert_same(left: Any, right: Any) -> None:
    """Bitwise."""
    ours, theirs = split_state(left), split_state(right)
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in ours[0].items():
        assert tensor.dtype == theirs[0][name].dtype, name
        assert torch.equal(tensor, theirs[0][name]), name


def results(run: Run) -> dict[str, Any]:
    run.model.eval()
    with torch.no_grad():
        output = run.model(batch_of(99, run.dtype)[0])
    return {**state_of(run), "masks": run.chain.masks(), "calibration": run.chain.calibration(), "output": output}


def test_the_table_holds_every_algorithm() -> None:
    assert set(COMPRESSORS) <= {algorithm.name for algorithm in ALGORITHMS}


@every_algorithm
def test_it_trains_and_leaves_what_it_promises(algorithm: Algorithm) -> None:
    run = Run(algorithm)
    losses = run.train()
    assert all(loss == loss for loss in losses)
    assert len(losses) == algorithm.rounds * STEPS
    masked = {name: float(targets["weight"].mean()) for name, targets in run.chain.masks().items()}
    kinds = module_names(run.model)
    assert masked == {name: 0.5 for name in kinds if kinds[name] in algorithm.masked}
    assert set(run.chain.calibration()) == ({"stem", "branch", "head"} if algorithm.quantizes else set())


@every_algorithm
def test_it_is_bitwise_repeatable(algorithm: Algorithm) -> None:
    first, second = Run(algorithm), Run(algorithm)
    assert first.train() == second.train()
    assert_same(results(first), results(second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("algorithm", "death"), DEATHS)
def test_a_resumed_training_ends_as_an_undisturbed_one(
    algorithm: Algorithm, death: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    undisturbed = Run(algorithm, dtype)
    undisturbed.train()
    killed = Run(algorithm, dtype)
    with pytest.raises(Killed):
        killed.train(dies_before=death)
    resumed = restored(through_files(state_of(killed), tmp_path), algorithm, dtype)
    resumed.train()
    assert_same(results(resumed), results(undisturbed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_algorithm
def test_fresh_objects_restore_what_was_trained(algorithm: Algorithm, dtype: torch.dtype, tmp_path: Path) -> None:
    trained = Run(algorithm, dtype)
    trained.train()
    again = restored(through_files(state_of(trained), tmp_path), algorithm, dtype)
    assert_same(results(again), results(trained))


@every_algorithm
def test_the_model_state_alone_gives_the_same_outputs(algorithm: Algorithm) -> None:
    trained, fresh = Run(algorithm), Run(algorithm)
    trained.train()
    fresh.model.load_state_dict(trained.model.state_dict())
    for key in ("output", "masks", "calibration"):
        assert_same(results(fresh)[key], results(trained)[key])


@every_algorithm
def test_unwrapping_leaves_the_users_model(algorithm: Algorithm) -> None:
    run = Run(algorithm)
    run.train()
    masks = run.chain.masks()
    run.chain.unwrap()
    plain = network()
    assert list(run.model.state_dict()) == list(plain.state_dict())
    assert [(name, type(module)) for name, module in run.model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    for module in run.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "raycomp" not in "".join(vars(module))
    for name, targets in masks.items():
        for target, mask in targets.items():
            assert bool((run.model.get_submodule(name).get_parameter(target)[mask == 0] == 0).all())


@every_algorithm
def test_wrapping_again_simulates_as_before(algorithm: Algorithm) -> None:
    run = Run(algorithm)
    run.train()
    before = results(run)
    run.chain.unwrap()
    run.chain.wrap()
    after = results(run)
    for key in ("output", "masks", "calibration"):
        assert_same(after[key], before[key])


@every_algorithm
def test_copies_before_and_after_training_live_their_own_lives(algorithm: Algorithm) -> None:
    run = Run(algorithm)
    untrained = copy.deepcopy(run.model)
    start = copy.deepcopy(run.model.state_dict())
    run.train()
    trained = copy.deepcopy(run.model)
    assert module_names(trained) == module_names(network())
    images = batch_of(99)[0]
    assert torch.equal(trained.eval()(images), run.model.eval()(images))
    run.chain.unwrap()
    run.model.load_state_dict(network().state_dict())
    assert not torch.equal(trained(images), run.model(images))
    assert_same(untrained.state_dict(), start)


@every_algorithm
def test_the_simulated_model_can_be_exported(algorithm: Algorithm) -> None:
    run = Run(algorithm)
    run.train()
    run.model.eval()
    images = batch_of(99)[0]
    exported = torch.export.export(run.model, (images,)).module()
    assert torch.allclose(exported(images), run.model(images), atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS[-2:], ids=lambda algorithm: algorithm.name)
def test_a_compiled_model_trains_and_computes_the_same(algorithm: Algorithm) -> None:
    # The backend that compiles nothing: what is tested is that the graph is captured right.
    compiled, plain = Run(algorithm), Run(algorithm)
    wrapped = torch.compile(compiled.model, backend="eager")
    assert compiled.train(forward=wrapped) == plain.train()
    images = batch_of(99)[0]
    assert torch.equal(wrapped(images), plain.model(images))
