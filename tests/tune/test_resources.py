"""How many trials run at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycomp.config import JobConfig, parse_job
from raycomp.tune.resources import largest, trials_at_once
from tests.tune.jobs import tiny_job


def job(folder: Path, **scaling: Any) -> JobConfig:
    return parse_job({**tiny_job(folder), "scaling": scaling})


@pytest.mark.parametrize(
    ("resources", "use_gpu", "expected"),
    [
        ({"CPU": 8.0}, False, 4),
        ({"CPU": 7.9}, False, 3),
        ({"CPU": 2.0}, False, 1),
        ({"CPU": 1.0}, False, 1),
        ({"CPU": 64.0, "GPU": 5.0}, True, 2),
        ({"CPU": 64.0, "GPU": 5.0}, False, 32),
    ],
)
def test_trials_are_bounded_by_what_their_workers_reserve(
    tmp_path: Path, resources: dict[str, float], use_gpu: bool, expected: int
) -> None:
    assert trials_at_once([job(tmp_path, num_workers=2)], resources, use_gpu=use_gpu) == expected


def test_the_most_demanding_trial_counts(tmp_path: Path) -> None:
    jobs = [job(tmp_path), job(tmp_path, num_workers=3, resources_per_worker={"CPU": 2}), job(tmp_path, num_workers=2)]
    assert trials_at_once(jobs, {"CPU": 12.0}, use_gpu=False) == 2
    assert largest(jobs) is jobs[1]


def test_other_resources_bound_too(tmp_path: Path) -> None:
    special = job(tmp_path, resources_per_worker={"CPU": 0.5, "fpga": 1})
    assert trials_at_once([special], {"CPU": 8.0, "fpga": 3.0}, use_gpu=False) == 3
