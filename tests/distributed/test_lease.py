"""One driver at a time: who is refused, who may take over, and who has lost its run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from raycomp.distributed import lease as module
from raycomp.distributed.lease import Holder, lease
from raycomp.distributed.records import record_bytes
from raycomp.errors import ClusterError
from raycomp.storage import Store, open_store
from tests.conftest import ObjectStore


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_S", 0.02)
    monkeypatch.setattr(module, "_LOOK_S", 0.05)
    monkeypatch.setattr(module, "_SILENCE_S", 0.5)


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def _left_by(place: Store, host: str, process: int, **more: Any) -> None:
    left = replace(Holder.this_process(), host=host, process=process, **more)
    place.join("lease").write_bytes("000000.json", record_bytes(module._HOLDER, left))


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
    with pytest.raises(ClusterError, match="process 8 on elsewhere"), lease(place, lambda _: beating.start()):
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


def test_a_process_of_another_container_of_this_host_is_not_taken_for_dead(place: Store) -> None:
    """Its number is no process's here, and it may well be alive."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _left_by(place, socket.gethostname(), ended.pid, numbering="another")
    beating = threading.Thread(
        target=_left_by, args=(place, socket.gethostname(), ended.pid), kwargs={"numbering": "another", "beats": 1}
    )
    with pytest.raises(ClusterError, match="works on this run"), lease(place, lambda _: beating.start()):
        pass
    beating.join()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "h", "process": 1, "since": "yesterday"}'])
def test_a_damaged_file_of_a_holder_that_lives_lets_nobody_in(place: Store, content: str) -> None:
    with lease(place, print):
        place.join("lease").write_bytes("000000.json", content.encode())
        with pytest.raises(ClusterError, match=rf"process {os.getpid()} on .* works on this run"), lease(place, print):
            pass


def test_a_damaged_file_that_nobody_writes_anew_is_followed(place: Store) -> None:
    place.join("lease").write_bytes("000000.json", b"{")
    told: list[str] = []
    with lease(place, told.append) as held:
        held.check()
    assert told[-1] == "a process whose file is damaged gives no sign of life: its run is taken over"


@pytest.mark.parametrize("name", ["x.txt", ".000000.json.1f", "zz/000009.json", ".DS_Store"])
def test_what_else_lies_in_the_folder_holds_nothing(place: Store, name: str) -> None:
    for _ in range(2):
        place.join("lease").write_bytes(name, b"?")
        with lease(place, print) as held:
            held.check()
    place.join("lease").delete(name)
    with lease(place, print) as held:
        held.check()


def test_a_lease_goes_on_where_files_of_earlier_holders_are_gone(place: Store) -> None:
    for _ in range(2):
        with lease(place, print):
            pass
    place.join("lease").delete("000000.json")
    with lease(place, print) as held:
        held.check()
        place.join("lease").delete_dir()
        held.check()


def test_a_clock_that_is_behind_the_holder_s_tells_no_negative_age(place: Store) -> None:
    ahead = datetime.now(UTC) + timedelta(hours=9)
    told: list[str] = []
    _left_by(place, "elsewhere", 10**20, since=ahead)
    with lease(place, told.append):
        pass
    assert told[0].startswith("this run is in the hands of process 100000000000000000000 on elsewhere, for 0 s")


def test_a_check_waits_for_a_store_that_is_away_as_the_run_does(
    object_store_keys: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run was lost to a store that was away when it was about to publish. A late sign of life would be no sign."""
    monkeypatch.setattr(module, "_BEAT_S", 60)
    place = open_store(object_store_keys.uri(), object_store_keys.endpoint).patient()
    with lease(place, print) as held:
        patience = [each.filesystem.attempts for each in (held._store, held._signs)]  # type: ignore[attr-defined]
    assert patience == [9, 3]


def test_signs_of_life_do_not_make_storage_anew_that_went_away(tmp_path: Path) -> None:
    """A volume that is unmounted leaves its mount point, which must not be filled beneath it."""
    volume = tmp_path / "volume"
    with lease(open_store(volume / "job"), print):
        volume.rename(tmp_path / "elsewhere")
        time.sleep(0.2)
        assert not volume.exists()
    assert not volume.exists()
