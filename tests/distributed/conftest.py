"""One local Ray for all tests of this folder, and drivers in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).parents[2]
# A report waits for the controller's next look, and the controller reads this when Ray starts it.
SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="package")
def local_ray() -> Iterator[str]:
    """A Ray with 4 CPUs that this process is connected to; its address, for drivers in other processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        context = ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": SETTINGS},
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


def driver(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process that runs `script` from the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
