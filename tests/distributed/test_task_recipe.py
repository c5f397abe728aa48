"""Tasks that Python gives: what travels, what can't and is told so, and what a job keeps of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raycomp import CompressionJob, Task
from raycomp.config import TaskConfig
from raycomp.config.sweep_plan import parse_sweep
from raycomp.distributed import task_digest
from raycomp.distributed.task_recipe import TaskRecipe, task_entry
from raycomp.errors import ConfigError, TaskError
from raycomp.storage import open_artifact
from tests.contracts import settings, tiny
from tests.contracts.tiny import Tiny
from tests.distributed.conftest import driver

_LOCK = threading.Lock()

_SCRIPT = """
import json, sys, torch
from raycomp import CompressionJob
from tests.contracts.tiny import Tiny

class Scaled(Tiny):
    def __init__(self, scale, **more):
        super().__init__(**more)
        self.scale = scale

    def loss(self, output, batch):
        return self.scale.sum() * super().loss(output, batch)

job = json.loads(sys.argv[1])
task = Scaled(torch.tensor([0.25, 0.75]), dropout=0.3)
result = CompressionJob(job, task=task).fit()
print(result.artifact_uri)
"""


class Holds(Tiny):
    def __init__(self, kept: object) -> None:
        super().__init__()
        self.kept = kept


class Inner:
    def __init__(self, inner: object) -> None:
        self.inner = inner


class InASlot:
    __slots__ = ("slot",)

    def __init__(self, slot: object) -> None:
        self.slot = slot


class HoldsItself(Holds):
    def __init__(self) -> None:
        super().__init__(self)
        self.lock = threading.Lock()


class OfTheClass(Tiny):
    LOCK = threading.Lock()


class OfTheBase(OfTheClass):
    pass


class UsesLock(Tiny):
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        with _LOCK:
            return super().loss(output, batch)


class UsesItWithin(Tiny):
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return next(super(UsesItWithin, self).loss(output, batch) for _ in range(1) if not _LOCK.locked())


class UsesAHelper(Tiny):
    def loss(self, output: Any, batch: Any) -> torch.Tensor:
        return super().loss(output, batch) if _is_free() else output


def _is_free() -> bool:
    return not _LOCK.locked()


def _closed_over() -> type[Task]:
    lock = threading.Lock()

    class Closed(Tiny):
        def loss(self, output: Any, batch: Any) -> torch.Tensor:
            with lock:
                return super().loss(output, batch)

    return Closed


class ComesBackBroken(Tiny):
    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("no way back")


class NeedsTwo(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("only one argument goes along")


def _job(folder: Path, **task: Any) -> dict[str, Any]:
    job = tiny.job(tiny.scheduled_pruner(1, 2), steps=6)
    job["storage"] = {"uri": str(folder)}
    del job["task"]
    return {**job, **({"task": task} if task else {})}


@pytest.mark.parametrize(
    ("task", "named"),
    [
        (Holds(threading.Lock()), "Holds.kept"),
        (Holds(Inner({"a": [0, Inner(threading.Lock())]})), "Holds.kept.inner['a'][1].inner"),
        (Holds(InASlot(threading.Lock())), "Holds.kept.slot"),
        (Holds(partial(Inner, threading.Lock())), "Holds.kept[1]"),
        (Holds(lambda: _LOCK), "'_LOCK', which <lambda>() uses,"),
        (HoldsItself(), "HoldsItself.lock"),
        (OfTheClass, "OfTheClass.LOCK"),
        (OfTheBase(), "OfTheClass.LOCK"),
        (UsesLock(), "'_LOCK', which UsesLock.loss() uses,"),
        (UsesLock, "'_LOCK', which UsesLock.loss() uses,"),
        (UsesItWithin, "'_LOCK', which UsesItWithin.loss() uses,"),
        (UsesAHelper(), "'_LOCK', which _is_free() uses,"),
        (_closed_over(), "'lock', which _closed_over.<locals>.Closed.loss() uses,"),
    ],
)
def test_validate_tells_what_can_t_travel(task: Any, named: str, tmp_path: Path) -> None:
    job = CompressionJob(_job(tmp_path), task=task)
    with pytest.raises(TaskError) as caught:
        job.validate()
    assert f"CompressionJob(task=…): {named} can't travel to the workers: cannot pickle '_thread.lock'" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (ComesBackBroken(), "the task can't be unpickled: RuntimeError: no way back"),
        (Holds(Inner([NeedsTwo(1, 2)])), "Holds.kept.inner[0] can't be unpickled: TypeError: NeedsTwo.__init__()"),
    ],
)
def test_validate_tells_what_comes_back_broken(task: Any, told: str, tmp_path: Path) -> None:
    job = CompressionJob(_job(tmp_path), task=task)
    with pytest.raises(TaskError) as caught:
        job.validate()
    assert told in str(caught.value)


@dataclass(frozen=True)
class Frozen(Tiny):
    dropout: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", {})
        object.__setattr__(self, "samples", Tiny().samples)


@pytest.mark.parametrize("task", [Frozen(), Frozen])
def test_a_frozen_dataclass_is_a_task(task: Any, tmp_path: Path) -> None:
    made = TaskRecipe.of(tmp_path, task).make(TaskConfig(entrypoint="tests:Frozen"), tmp_path)
    assert made.prepared == tmp_path


@pytest.mark.parametrize("task", [5, int, nn.Linear(1, 1), "tasks.py:Tiny"])
def test_what_is_no_task_is_refused_at_once(task: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"give an instance of a subclass of raycomp\.Task, or the class"):
        CompressionJob(_job(tmp_path), task=task)


def test_a_class_is_called_with_the_job_s_arguments(tmp_path: Path) -> None:
    assert CompressionJob(_job(tmp_path, arguments={"dropout": 0.3}), task=Tiny).validate() == ()
    with pytest.raises(TaskError, match="Tiny does not take these arguments"):
        CompressionJob(_job(tmp_path, arguments={"dropoff": 0.3}), task=Tiny).validate()


def test_a_made_task_has_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"job.task.arguments: the task that was given is already made"):
        CompressionJob(_job(tmp_path, arguments={"dropout": 0.3}), task=Tiny())


def test_a_task_stands_instead_of_the_job_file_s(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(CompressionJob(_job(tmp_path, entrypoint="nowhere:Task"), task=Tiny).config.to_yaml())
    job = CompressionJob(file, task=Tiny(dropout=0.3))
    assert job.config.task.entrypoint == "tests.contracts.tiny:Tiny"
    assert job.validate() == ()


def test_what_is_done_to_a_task_later_is_not_seen(tmp_path: Path) -> None:
    task = Tiny()
    recipe = TaskRecipe.of(tmp_path, task)
    task.samples = -1
    made = recipe.make(CompressionJob(_job(tmp_path), task=task).config.task, tmp_path)
    assert isinstance(made, Tiny) and made.samples == Tiny().samples
    assert made.prepared == tmp_path and task.prepared is None


def test_equal_tasks_are_one_job_and_others_are_not(tmp_path: Path) -> None:
    def digest(task: Task | type[Task]) -> str:
        return CompressionJob(_job(tmp_path), task=task).config.result_digest()

    one, same, other = Tiny(), Tiny(), Tiny()
    for task, value in ((one, 1.0), (same, 1.0), (other, 2.0)):
        task.weights = torch.full((3,), value)  # type: ignore[attr-defined]
    assert digest(one) == digest(same) != digest(other)
    assert digest(Tiny) != digest(Tiny())


def _scaled(factor: float) -> Any:
    return lambda loss: loss * factor


_MADE_UP: list[tuple[object, object]] = [
    (lambda x: x * 2, lambda x: x * 3),
    (_scaled(1.0), _scaled(5.0)),
    (lambda x, y=1: x, lambda x, y=2: x),
    (torch.eye(3).to_sparse(), torch.zeros(3, 3).to_sparse()),
    (torch.ones(2, dtype=torch.cfloat).mul(1j), torch.ones(2, dtype=torch.cfloat).mul(1j).conj()),
    (nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)),
    ({"a", "b"}, {"a", "c"}),
]


@pytest.mark.parametrize(("one", "other"), _MADE_UP)
def test_what_a_task_holds_tells_it_from_others_whatever_it_is_named(one: object, other: object) -> None:
    digests = [task_digest.digest(Holds(each)) for each in (one, other, one)]
    assert digests[0] is not None and digests[0] == digests[2] != digests[1]


def test_a_set_of_texts_is_the_same_in_every_process() -> None:
    code = (
        "from tests.distributed.test_task_recipe import Holds; from raycomp.distributed.task_digest import digest;"
        "print(digest(Holds({'a', 'b', 'c', 'd'})))"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        .stdout.decode()
        .strip()
        for seed in ("1", "2")
    }
    assert len(found) == 1 and found != {""}


def test_a_process_finds_modules_where_the_driver_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far_helper.py").write_text("VALUE = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = TaskRecipe.of(tmp_path, Tiny)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    recipe.given()
    assert importlib.util.find_spec("far_helper") is not None


@pytest.mark.parametrize("change", [{"numbers": torch.zeros(2, 2)}, {"function": torch.cosh}, {"kind": nn.Conv1d}])
def test_a_digest_is_of_numbers_functions_and_classes(change: dict[str, Any]) -> None:
    task = Tiny()
    held = {"numbers": torch.zeros(4), "function": torch.sinh, "kind": nn.Linear, "bits": torch.ones(1).bfloat16()}
    vars(task).update(held)
    before = task_digest.digest(task)
    vars(task).update(held | change)
    assert before is not None and before != task_digest.digest(task)


def test_modules_that_stay_behind_are_named_where_nodes_have_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Helped(Tiny):
        def model(self) -> nn.Module:
            assert settings.SETTINGS
            return super().model()

    assert CompressionJob(_job(tmp_path), task=Helped).validate() == ()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (told,) = CompressionJob(_job(tmp_path), task=Helped).validate()
    assert told == "modules that don't go along with the task, and that each node must have: tests.contracts.settings"


def test_a_file_can_t_name_what_python_gave(tmp_path: Path) -> None:
    stored = CompressionJob(_job(tmp_path), task=Tiny()).config
    with pytest.raises(TaskError, match="Python gave the task; no file has it"):
        CompressionJob(stored).validate()
    with pytest.raises(TaskError, match="Python gave the task; no file has it"):
        CompressionJob(_job(tmp_path, entrypoint="__main__:Tiny")).validate()


def test_a_sweep_takes_a_task(tmp_path: Path) -> None:
    sweep = {"job": _job(tmp_path), "search": {"task.arguments.dropout": {"grid": [0.1, 0.2]}}}
    plan = parse_sweep(sweep, tmp_path, task_entry(Tiny))
    tasks = [TaskRecipe.of(tmp_path, Tiny).make(trial.job.task) for trial in plan.trials]
    assert [task.network["dropout"] for task in tasks] == [0.1, 0.2]  # type: ignore[attr-defined]


@pytest.mark.cluster
def test_a_task_of_a_script_runs_on_two_workers(local_ray: str, tmp_path: Path) -> None:
    job = {**_job(tmp_path), "scaling": {"num_workers": 2}}
    out, err = driver(_SCRIPT, json.dumps(job), RAY_ADDRESS=local_ray).communicate(timeout=200)
    assert out, err
    artifact = open_artifact(out.strip())
    assert artifact.manifest.lineage["task"] == "__main__:Scaled"
    assert not [file for file in tmp_path.rglob("*.pkl") if b"Scaled" in file.read_bytes()]
