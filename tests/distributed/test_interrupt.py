"""SIGINT and SIGTERM: one line with what is saved and how to go on, the right exit code, and nothing left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil  # Ray brings it along, once it is imported (by conftest).
import pytest
import yaml

from raycomp.distributed.interrupt import (
    Interrupted,
    held_back,
    interruptible,
    raise_if_interrupted,
    same_signals,
    told,
)
from tests.contracts import tiny
from tests.distributed.conftest import ROOT


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_block_with_its_exit_code(signum: signal.Signals, code: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught, interruptible():
        with same_signals():
            signal.signal(signum, signal.SIG_IGN)  # as Ray takes it for itself
        os.kill(os.getpid(), signum)
        raise AssertionError("it was not heard")
    assert caught.value.exit_code == code and isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signum) is before
    raise_if_interrupted()  # what was heard is over


def test_a_signal_that_ray_makes_a_plain_interrupt_of_keeps_its_exit_code() -> None:
    with pytest.raises(Interrupted) as caught, interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            raise KeyboardInterrupt from None
    assert caught.value.exit_code == 143


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = """
import os, signal
from raycomp.distributed.interrupt import interruptible
try:
    with interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
finally:
    print("went on")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (143, "")


def test_a_second_signal_leaves_no_temporary_folder(tmp_path: Path) -> None:
    script = """
import os, signal
from raycomp.distributed.interrupt import interruptible
from raycomp.storage import scratch
with interruptible(), scratch() as folder:
    (folder / "weights").write_bytes(b"w" * 1000)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=60)
    assert ended.returncode == 143
    assert list(tmp_path.iterdir()) == []


class _Finalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_a_finalizer_meets_is_not_lost() -> None:
    """Python drops what is raised there; a job went on to its end, with exit code 0, when it was told to stop."""
    with pytest.raises(Interrupted) as caught, interruptible():
        held = _Finalized()
        del held
        time.sleep(10)
        raise AssertionError("it was not heard")
    assert caught.value.exit_code == 143


def test_what_must_not_stop_halfway_ends_before_the_signal_is_heard() -> None:
    done: list[str] = []
    with pytest.raises(Interrupted) as caught, interruptible():
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("whole")
        done.append("more")
    assert done == ["whole"] and caught.value.exit_code == 143


def test_of_nested_blocks_the_innermost_tells_and_the_code_stays() -> None:
    lines: list[str] = []
    with (
        pytest.raises(Interrupted) as caught,
        interruptible(),
        told(lines.append, lambda: "nothing is saved", "outer"),
        interruptible(),
        told(lines.append, lambda: "epoch 3 is saved", "run --resume"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it was not heard")
    assert lines == ["interrupted: epoch 3 is saved; to go on: run --resume"]
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_command_hears_of_signals_before_it_imports_what_is_slow(tmp_path: Path, command: str) -> None:
    file = tmp_path / "file.yaml"
    job = tiny.job(steps=4) | {"storage": {"uri": str(tmp_path / "stored")}}
    sweep = {"job": job, "search": {"training.seed": {"grid": [1]}}}
    file.write_text(yaml.safe_dump(job if command == "run" else sweep))
    process = subprocess.Popen(
        [sys.executable, "-m", "raycomp", command, str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None and "starting raycomp" in process.stdout.readline()
    process.terminate()
    out, _ = process.communicate(timeout=60)
    (line,) = (line for line in out.splitlines() if line.startswith("interrupted"))
    assert line == f"interrupted: before a {command} began; to go on: raycomp {command} {file} --resume"
    assert process.returncode == 143 and "Traceback" not in out


def test_in_another_thread_signals_stay_as_they_are() -> None:
    """A sweep's trials run in such a thread."""
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def run() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.cluster
def test_a_terminated_job_says_how_to_go_on_and_leaves_nothing_running(tmp_path: Path) -> None:
    job = tiny.job(tiny.pruner("L1NormPruner"), steps=4000) | {"storage": {"uri": str(tmp_path / "stored")}}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "raycomp", "run", str(file), "--set", "training.seed=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        # Lines come once a second, and epochs are shorter.
        epochs = (re.search(r"epoch (\d+)/", line) for line in process.stdout)
        begun = any(epoch is not None and int(epoch[1]) >= 3 for epoch in epochs)
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert begun and len(family) > 5
    (line,) = (line for line in out.splitlines() if line.startswith("interrupted"))
    saved, _, how = line.partition("; to go on: ")
    assert "is saved up to epoch" in saved and saved.endswith("of stage fused")
    assert how == f"raycomp run {file} --resume --set training.seed=1"
    assert process.returncode == 143
    assert "***" not in out and "Traceback" not in out
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [member for member in alive if member.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.cluster
def test_a_signal_that_meets_ray_half_connected_ends_the_process_with_its_code(tmp_path: Path) -> None:
    """Ray's C++ core takes SIGTERM for itself as it connects, and would abort with a stack of calls."""
    script = f"""
import os, signal, sys
from ray._private import worker
from raycomp.config import parse_job
from raycomp.distributed.cluster import connect
from raycomp.distributed.interrupt import Interrupted, interruptible
whole = worker.connect
def signalled(*args, **kwargs):
    whole(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)
worker.connect = signalled
try:
    with interruptible(), connect(parse_job({tiny.job(steps=4) | {"storage": {"uri": str(tmp_path)}}!r})):
        print("went on")
except Interrupted as interrupted:
    sys.exit(interrupted.exit_code)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (143, "") and "***" not in ended.stderr
