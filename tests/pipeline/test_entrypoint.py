from __future__ import annotations

import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from raycomp.config import TaskConfig
from raycomp.distributed.interrupt import Interrupted, interruptible
from raycomp.errors import TaskError
from raycomp.pipeline.data.samples import fetched_batches
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.task import Task
from raycomp.pipeline.user_code import user_code

SOURCE = """
from pathlib import Path
from raycomp.pipeline.task import Task
from task_helper import NUMBER


class Small(Task):
    def __init__(self, width: int, depth: int = 2) -> None:
        self.width, self.depth, self.number = width, depth, NUMBER
        if width < 0:
            raise ValueError(f"width is {width}")


class NoTask:
    pass
"""


@pytest.fixture(autouse=True)
def restored_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "small.py").write_text(SOURCE)
    (tasks / "task_helper.py").write_text("NUMBER = 5\n")
    (tasks / "broken.py").write_text("import os\n\nos.environ['no such variable']\n")
    (tasks / "needs_more.py").write_text("import no_such_package_at_all\n")
    return tmp_path


def config(entrypoint: str, **arguments: object) -> TaskConfig:
    return TaskConfig.model_validate({"entrypoint": entrypoint, "arguments": arguments})


def test_a_file_is_found_beside_the_job_with_its_neighbours(folder: Path) -> None:
    task = build_task(config("tasks/small.py:Small", width=3), folder, prepared=folder)
    assert (task.width, task.depth, task.number) == (3, 2, 5)  # type: ignore[attr-defined]
    assert task.prepared == folder


def test_a_module_is_found_beside_the_job(folder: Path) -> None:
    task = build_task(config("small:Small", width=3, depth=4), folder / "tasks")
    assert task.depth == 4  # type: ignore[attr-defined]


def test_a_file_named_like_a_package_hides_nothing(folder: Path) -> None:
    (folder / "json.py").write_text(SOURCE)
    (folder / "task_helper.py").write_text("NUMBER = 6\n")
    before = sys.modules["json"]
    assert build_task(config("json.py:Small", width=1), folder).number == 6  # type: ignore[attr-defined]
    assert sys.modules["json"] is before


@pytest.mark.parametrize(
    ("entrypoint", "arguments", "expected"),
    [
        ("tasks/none.py:Small", {}, "there is no file .*tasks/none.py"),
        ("no_such_module:Small", {}, "no_such_module:Small: there is no module 'no_such_module'"),
        ("raycomp.nothing:Small", {}, "there is no module 'raycomp.nothing'"),
        ("tasks/small.py:Smal", {}, r"'Smal' is not there \(its tasks are Small\)"),
        ("tasks/small.py:NoTask", {}, "'NoTask' is not a subclass of raycomp.Task"),
        (
            "tasks/small.py:Small",
            {},
            r"missing a required argument: 'width' \(it takes width: int, depth: int = 2\)",
        ),
        ("tasks/small.py:Small", {"width": 1, "deep": 2}, "got an unexpected keyword argument 'deep'"),
        ("tasks/small.py:Small", {"width": -1}, r"small.py:11: Small\(width\) raised ValueError: width is -1"),
        ("tasks/broken.py:Small", {}, r"broken.py:3: importing broken.py raised KeyError: 'no such variable'"),
        ("tasks/needs_more.py:Small", {}, "needs_more.py:1: .* No module named 'no_such_package_at_all'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    folder: Path, entrypoint: str, arguments: dict[str, object], expected: str
) -> None:
    with pytest.raises(TaskError, match=expected):
        build_task(config(entrypoint, **arguments), folder)


def test_a_module_whose_own_import_fails_is_not_called_missing(folder: Path) -> None:
    with pytest.raises(TaskError, match="importing needs_more raised ModuleNotFoundError"):
        build_task(config("needs_more:Small"), folder / "tasks")


def test_an_error_of_the_user_keeps_its_cause_and_survives_pickling() -> None:
    with pytest.raises(TaskError) as raised, user_code("loss()"):
        int("x")
    assert isinstance(raised.value.__cause__, ValueError)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert str(copy) == str(raised.value)
    assert "loss() raised ValueError: invalid literal for int()" in str(copy)
    with pytest.raises(TaskError, match=r"^own$"), user_code("loss()"):
        raise TaskError("own")


def leave() -> None:
    sys.exit(3)


def interrupt() -> None:
    raise KeyboardInterrupt


def in_a_thread(function: Callable[[], None]) -> BaseException:
    """What a Ray Train worker's training thread would end with."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            with user_code("Digits.loss()"):
                function()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0]


@pytest.mark.parametrize("function, kind", [(leave, "SystemExit: 3"), (interrupt, "KeyboardInterrupt")])
def test_leaving_in_the_midst_of_training_is_the_task_s_own_error(function: Callable[[], None], kind: str) -> None:
    error = in_a_thread(function)
    assert isinstance(error, TaskError) and error.message == f"Digits.loss() raised {kind}"
    assert error.where is not None and error.where.startswith(__file__)


def test_a_real_interrupt_passes_through_the_user_s_code() -> None:
    stopped = SystemExit(15)
    stopped.is_ray_terminate = True  # type: ignore[attr-defined]
    for error in (KeyboardInterrupt(), Interrupted(signal.SIGTERM), stopped):
        with pytest.raises(type(error)), user_code("loss()"):
            raise error


def test_an_interrupt_raised_by_hand_is_none_where_raycomp_hears_the_signals() -> None:
    with interruptible(), pytest.raises(TaskError, match="KeyboardInterrupt"), user_code("loss()"):
        interrupt()
    with pytest.raises(Interrupted), interruptible(), user_code("loss()"):
        signal.raise_signal(signal.SIGINT)


class Leaving(Dataset[int]):
    """Ends its process where it is read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        sys.exit(5)


class Reading(Task):
    """Needs no more than its data."""


@pytest.mark.parametrize("processes", [0, 1])
def test_leaving_in_a_loading_process_names_the_data(processes: int) -> None:
    wanted = [torch.tensor([0, 1])]
    with pytest.raises(TaskError, match="sample 0 of Reading's data raised SystemExit: 5"):
        list(fetched_batches(Reading(), Leaving(), wanted, 0, 0, num_data_workers=processes))
