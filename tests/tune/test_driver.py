"""What the driver decides, with trials that end as the test says instead of running on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ray import tune
from ray.tune.execution import class_cache
from torch import nn
from torch.utils.data import TensorDataset

from raycomp.config import JobConfig
from raycomp.distributed.cluster import Cluster
from raycomp.pipeline.task import Task
from raycomp.results.summary import TrialFigures
from raycomp.tune import sweep
from raycomp.tune.driver import _keys_kept, _Sweep
from raycomp.tune.trial import TrialOrder
from tests.tune.jobs import RATIO, tiny_job

End = Callable[[TrialOrder], TrialFigures | None]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Callable[[End], list[str]]:
    """Makes trials end as a function says (None: the process is lost); gives the list of those that will have run."""

    @contextmanager
    def connected(job: JobConfig, *_: object, **__: object) -> Iterator[Cluster]:
        yield Cluster(True, 1, False, "no cluster")

    def install(end: End) -> list[str]:
        ran: list[str] = []

        def run(self: _Sweep, orders: Mapping[str, TrialOrder], cluster: Cluster) -> dict[str, str]:
            lost = {}
            for name, order in orders.items():
                ran.append(name)
                row = end(order)
                if row is None:
                    lost[name] = "its process was lost"
                else:
                    order.sweep_store.write_row(row)
            return lost

        monkeypatch.setattr(_Sweep, "_tune", run)
        return ran

    monkeypatch.setattr("raycomp.tune.driver.connect", connected)
    return install


def good(order: TrialOrder) -> TrialFigures:
    ratio = order.settings[RATIO]
    assert isinstance(ratio, float)
    return TrialFigures(order.trial, order.settings, 1 - ratio, int(100 * (1 - ratio)), 10)


def settings(folder: Path, **more: object) -> dict[str, object]:
    return {"job": tiny_job(folder), "search": {RATIO: {"grid": [0.25, 0.5, 0.75]}}, "metric": "accuracy", **more}


def test_a_lost_trial_has_its_cause_and_the_others_their_rows(
    tmp_path: Path, trials: Callable[[End], list[str]]
) -> None:
    trials(lambda order: None if order.trial == "01" else good(order))
    result = sweep(settings(tmp_path), tmp_path)
    assert [row.metric for row in result.rows] == [0.75, None, 0.25]
    assert [row.error for row in result.rows] == ["", "its process was lost", ""]
    assert [row.trial for row in result.front] == ["02", "00"]


def test_resume_runs_what_is_not_done(tmp_path: Path, trials: Callable[[End], list[str]]) -> None:
    def end(order: TrialOrder) -> TrialFigures | None:
        if order.trial == "00":
            return good(order)
        return TrialFigures(order.trial, order.settings, None, None, error="no luck") if order.trial == "01" else None

    trials(end)
    first = sweep(settings(tmp_path), tmp_path)
    assert len(first.failed) == 2
    ran = trials(good)
    second = sweep(settings(tmp_path), tmp_path, resume=True)
    assert ran == ["01", "02"]
    assert second.sweep == first.sweep
    assert [row.metric for row in second.rows] == [0.75, 0.5, 0.25]
    ran = trials(good)
    third = sweep(settings(tmp_path), tmp_path, resume=True)
    assert ran == ["00", "01", "02"]
    assert third.sweep != first.sweep


class Given(Task):
    """What Python gives in place of the job's task."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))

    def train_data(self) -> TensorDataset:
        images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(self.seed))
        return TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())

    def eval_data(self) -> TensorDataset:
        return self.train_data()


class Killed(BaseException):
    """Ends the driver."""


def test_a_sweep_of_a_task_that_python_gave_goes_on_where_its_driver_was_killed(
    tmp_path: Path, trials: Callable[[End], list[str]]
) -> None:
    def killed(order: TrialOrder) -> TrialFigures:
        if order.trial == "01":
            raise Killed
        return good(order)

    trials(killed)
    with pytest.raises(Killed):
        sweep(settings(tmp_path), tmp_path, task=Given(1))
    told: list[object] = []
    ran = trials(good)
    rows = sweep(settings(tmp_path), tmp_path, task=Given(1), resume=True).rows
    assert ran == ["01", "02"] and [row.metric for row in rows] == [0.75, 0.5, 0.25]
    ran = trials(good)
    sweep(settings(tmp_path), tmp_path, task=Given(2), resume=True, progress=told.append)
    assert ran == ["00", "01", "02"]
    assert "there is no unfinished sweep like this one: a new one begins" in told


def test_without_resume_a_sweep_begins_anew(tmp_path: Path, trials: Callable[[End], list[str]]) -> None:
    trials(lambda order: None)
    first = sweep(settings(tmp_path), tmp_path)
    ran = trials(good)
    assert sweep(settings(tmp_path), tmp_path).sweep != first.sweep
    assert ran == ["00", "01", "02"]


def test_less_can_be_better(tmp_path: Path, trials: Callable[[End], list[str]]) -> None:
    trials(good)
    result = sweep(settings(tmp_path, mode="min"), tmp_path)
    assert [row.trial for row in result.front] == ["02"]


def test_a_sweep_of_failures_still_ends_with_its_table(tmp_path: Path, trials: Callable[[End], list[str]]) -> None:
    trials(lambda order: TrialFigures(order.trial, order.settings, None, None, error="no luck"))
    result = sweep({**settings(tmp_path), "metric": None}, tmp_path)
    assert result.front == ()
    assert "no luck" in Path(result.report_path).read_text()


def test_ray_tune_reports_nothing_of_its_own(
    tmp_path: Path, trials: Callable[[End], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook its reporter cleared the cell, and an empty object of its own stood there."""
    given: list[tune.RunConfig] = []

    class Tuner:
        def __init__(self, *_: object, run_config: tune.RunConfig, **__: object) -> None:
            given.append(run_config)

        def fit(self) -> None:
            """Ends at once."""

    for name in ("with_parameters", "with_resources"):
        monkeypatch.setattr(tune, name, lambda *_, **__: None)
    monkeypatch.setattr(tune, "Tuner", Tuner)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    assert all(row.error for row in sweep(settings(tmp_path), tmp_path).rows)
    (run_config,) = given
    reporter = run_config.progress_reporter
    assert reporter is not None and not reporter.should_report([], done=True)


def test_trials_are_sent_no_keys_in_an_environment_that_ray_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainable:
        pass

    def sent() -> str:
        return str(class_cache._ActorClassCache().get(Trainable)._default_options["runtime_env"])

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    assert "hidden" in sent()
    with _keys_kept():
        assert "hidden" not in sent() and "RAY_CHDIR_TO_TRIAL_DIR" in sent()
    assert "hidden" in sent()
