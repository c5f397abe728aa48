"""Temporary folders: gone on every way out."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raycomp.storage import scratch

_KEEP = """
import sys
from raycomp.storage import scratch
with scratch() as folder:
    (folder / "weights").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def _holder() -> tuple[subprocess.Popen[str], Path]:
    """Another process within a scratch folder, and the folder."""
    process = subprocess.Popen([sys.executable, "-c", _KEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_its_user_s_alone_and_gone_after_the_block_and_after_an_error(temporary: Path) -> None:
    with pytest.raises(ValueError, match="broken"), scratch() as folder:
        assert folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
        (folder / "weights").write_bytes(b"x")
        raise ValueError("broken")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_uses_stays(temporary: Path) -> None:
    killed, left = _holder()
    alive, used = _holder()
    try:
        killed.kill()
        killed.wait()
        assert (left / "weights").exists()
        with scratch():
            assert not left.exists()
            assert (used / "weights").exists()
    finally:
        alive.communicate("go on\n", timeout=60)
    assert list(temporary.iterdir()) == []
