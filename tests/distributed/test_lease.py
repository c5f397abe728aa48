"""One driver at a time: who is refused, who may take over, and who has lost its run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raycomp.distributed import lease as module
from raycomp.distributed.lease import Holder, lease
from raycomp.errors import ClusterError
from raycomp.storage import Store, open_store


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_S", 0.02)
    monkeypatch.setattr(module, "_LOOK_S", 0.05)
    monkeypatch.setattr(module, "_SILENCE_S", 0.5)


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def _left_by(place: Store, host: str, process: int) -> None:
    left = Holder(host, process, "2026-11-25T07:00:00+00:00")
    place.join("lease").write_bytes("000000.json", module._HOLDER.dump_json(left))


def test_the_second_is_told_host_process_and_age(place: Store) -> None:
    with (
        lease(place, print),
        pytest.raises(ClusterError, match=rf"process {os.getpid()} on {socket.gethostname()}, for \d+ s"),
        lease(place, print),
    ):
        pass


def test_who_let_go_is_followed_at_once(place: Store) -> None:
    told: list[str] = []
    for _ in range(2):
        with lease(place, told.append) as held:
            held.check()
    assert told == []


def test_a_dead_process_of_this_machine_is_followed_at_once(place: Store) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _left_by(place, socket.gethostname(), ended.pid)
    told: list[str] = []
    with lease(place, told.append) as held:
        held.check()
    assert told == []


def test_a_silent_process_of_another_machine_is_watched_and_then_followed(place: Store) -> None:
    _left_by(place, "elsewhere", 7)
    told: list[str] = []
    with lease(place, told.append) as held:
        held.check()
    assert len(told) == 2 and all("process 7 on elsewhere" in line for line in told)
    assert "no sign of life" in told[1]


def test_a_live_process_of_another_machine_is_not_followed(place: Store) -> None:
    _left_by(place, "elsewhere", 7)
    beating = threading.Thread(target=_left_by, args=(place, "elsewhere", 8))
    with pytest.raises(ClusterError, match="process 7 on elsewhere"), lease(place, lambda _: beating.start()):
        pass
    beating.join()


def test_of_several_that_would_follow_one_does(place: Store) -> None:
    _left_by(place, "elsewhere", 7)
    outcomes: list[str] = []
    both = threading.Barrier(4)

    def follow() -> None:
        try:
            with lease(place, lambda _: None):
                outcomes.append("held")
                both.wait(10)
        except ClusterError:
            outcomes.append("refused")
            both.wait(10)

    threads = [threading.Thread(target=follow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]


def test_who_was_silent_for_too_long_may_store_nothing_more(place: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_S", 60)
    with lease(place, print) as first:
        monkeypatch.setattr(module, "_BEAT_S", 0.02)
        with lease(place, print), pytest.raises(ClusterError, match="has taken this run over"):
            first.check()
