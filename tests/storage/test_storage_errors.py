"""What goes wrong with storage is said at once, as one cause with its remedy."""

from __future__ import annotations

import errno
import http.server
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raycomp.errors import StorageError
from raycomp.storage import Store, open_artifact, open_store, publish, s3
from raycomp.storage.explain import explain
from tests.conftest import ObjectStore

ACTIONS: dict[str, Callable[[Store], object]] = {
    "check": lambda store: store.check(),
    "write": lambda store: store.write_bytes("a", b"1"),
    "create": lambda store: store.create_bytes("a", b"1"),
    "list": lambda store: store.files(),
}


def error_of(action: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        action()
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value


@pytest.mark.parametrize("action", ACTIONS)
def test_wrong_secret(wrong_secret: ObjectStore, action: str) -> None:
    store = open_store(wrong_secret.uri(), wrong_secret.endpoint)
    error = error_of(lambda: ACTIONS[action](store))
    assert error.message.endswith("the store refuses the secret (403)")
    assert error.remedy == "check AWS_SECRET_ACCESS_KEY"
    assert "not-the-secret" not in str(error)


def test_wrong_secret_when_an_artifact_is_opened(wrong_secret: ObjectStore) -> None:
    error = error_of(lambda: open_artifact(wrong_secret.uri(), wrong_secret.endpoint))
    assert error.message == "the store denies access (403)"


@pytest.mark.parametrize("action", ACTIONS)
def test_unknown_key(wrong_secret: ObjectStore, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    store = open_store(wrong_secret.uri(), wrong_secret.endpoint)
    assert error_of(lambda: ACTIONS[action](store)).remedy == "check AWS_ACCESS_KEY_ID"


def test_a_key_that_may_only_read(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.reader_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.reader_secret_key)
    error = error_of(open_store(object_store.uri(), object_store.endpoint).check)
    assert error.message == "it can't be written: the store denies access (403)"


@pytest.mark.parametrize("action", ACTIONS)
def test_missing_bucket(object_store_keys: ObjectStore, action: str) -> None:
    store = open_store("s3://no-such-bucket/x", object_store_keys.endpoint)
    assert error_of(lambda: ACTIONS[action](store)).message.endswith("there is no such bucket")


def test_missing_bucket_when_an_artifact_is_opened(object_store_keys: ObjectStore) -> None:
    error = error_of(lambda: open_artifact("s3://no-such-bucket/x", object_store_keys.endpoint))
    assert error.message == "there is no such bucket"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture
def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("action", ["check", "create"])
def test_nothing_listens(closed_port: str, action: str) -> None:
    started = time.monotonic()
    error = error_of(lambda: ACTIONS[action](open_store("s3://bucket/x", closed_port)))
    assert "the store can't be reached" in error.message
    assert error.remedy == "check the endpoint"
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("keys")
def test_no_such_host() -> None:
    error = error_of(open_store("s3://bucket/x", "http://no-such-host.invalid:9000").check)
    assert "the store can't be reached: there is no such host" in error.message
    assert "no-such-host.invalid:9000" in str(error)


def test_tls_where_there_is_none(object_store_keys: ObjectStore) -> None:
    endpoint = object_store_keys.endpoint.replace("http://", "https://")
    error = error_of(open_store(object_store_keys.uri(), endpoint).check)
    assert "does not speak TLS" in error.message


@pytest.mark.usefixtures("keys")
def test_an_endpoint_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycomp.storage.filesystem._PROBE_TIMEOUT_S", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        store = open_store("s3://bucket/x", f"http://127.0.0.1:{silent.getsockname()[1]}")
        error = error_of(store.check)
    assert "it does not answer in time" in error.message


def test_no_credentials(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of(lambda: open_store(object_store.uri(), object_store.endpoint))
    assert error.message == "there are no credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    error = error_of(lambda: open_store(object_store.uri(), object_store.endpoint))
    assert error.message == "there are no credentials: AWS_SECRET_ACCESS_KEY is not set"


def test_other_credentials_of_the_environment_are_left_to_arrow(monkeypatch: pytest.MonkeyPatch) -> None:
    location = s3.locate("s3://bucket/x", "http://127.0.0.1:9", None)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/token")
    s3.require_credentials(location)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s4://bucket/x", "there is no storage for 's4://'"),
        ("s3://KEY:VERYSECRET@bucket/x", "the URI holds credentials"),
        ("s3:///x", "it names no bucket"),
        ("", "got ''"),
    ],
)
def test_uris_that_are_not_right(uri: str, told: str) -> None:
    error = error_of(lambda: open_store(uri))
    assert told in error.message
    assert "VERYSECRET" not in str(error)


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        error = error_of(open_store(str(place)).check)
        assert error.message == "it can't be written: a file is where a folder should be"
        assert error.where == str(place)


def test_a_folder_that_nobody_may_write(tmp_path: Path) -> None:
    """Also for root, whom permission bits do not stop."""
    (tmp_path / "a.txt").touch()
    store = open_store("/proc/raycomp")
    assert "it can't be written" in error_of(store.check).message
    assert error_of(lambda: publish(store, "run", tmp_path, {"job": "j", "run": "r"})).where


class _Replies(http.server.BaseHTTPRequestHandler):
    """Answers PUTs with the statuses that its server holds, and keeps what it was asked to write."""

    def do_PUT(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        server.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(server.statuses.pop(0))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self._content()

    def do_GET(self) -> None:
        self._content()
        server = self.server
        assert isinstance(server, _Server)
        self.wfile.write(server.stored)

    def _content(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.stored)))
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Keeps the test's output clean."""


class _Server(http.server.ThreadingHTTPServer):
    statuses: list[int]
    stored = b"ours"
    body = b""


@pytest.fixture
def flaky() -> Iterator[_Server]:
    server = _Server(("127.0.0.1", 0), _Replies)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("statuses", "stored", "created"),
    [
        ([200], b"", True),
        ([412], b"ours", False),
        ([500, 200], b"", True),
        ([409, 412], b"theirs", False),
        ([503, 412], b"ours", True),
    ],
)
def test_a_create_that_was_in_doubt_is_cleared_up(
    flaky: _Server, statuses: list[int], stored: bytes, created: bool
) -> None:
    """After a failed answer the object may be there, and then it is ours if it holds what we wrote."""
    flaky.statuses, flaky.stored = list(statuses), stored
    store = open_store("s3://bucket/x", f"http://127.0.0.1:{flaky.server_address[1]}")
    assert store.create_bytes("claim", b"ours") is created
    assert flaky.body == b"ours"
    assert flaky.statuses == []


@pytest.mark.usefixtures("keys")
def test_a_create_gives_up_after_three_attempts(flaky: _Server) -> None:
    flaky.statuses = [500, 500, 500, 200]
    store = open_store("s3://bucket/x", f"http://127.0.0.1:{flaky.server_address[1]}")
    assert "500" in error_of(lambda: store.create_bytes("claim", b"ours")).message
    assert flaky.statuses == [200]


def test_a_mounted_file_of_credentials_serves(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a cluster's nodes need no keys in their environment, where Ray would show them."""
    file = tmp_path / "credentials"
    keys = f"aws_access_key_id = {object_store.access_key}\naws_secret_access_key = {object_store.secret_key}\n"
    file.write_text(f"[default]\naws_access_key_id = other\naws_secret_access_key = wrong\n[models]\n{keys}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "models")
    store = open_store(object_store.uri(), object_store.endpoint)
    store.check()
    assert store.create_bytes("claim", b"first") and not store.create_bytes("claim", b"second")
    assert store.read_bytes("claim") == b"first"


@pytest.mark.usefixtures("keys")
def test_a_store_that_is_away_for_a_while_is_waited_for(closed_port: str) -> None:
    """Longer than other requests wait; a run's stores are patient, also in the workers that they are sent to."""
    store = open_store("s3://bucket/x", closed_port)
    patient = pickle.loads(pickle.dumps(store.patient()))
    server: list[_Server] = []

    def come_back() -> None:
        server.append(_Server(("127.0.0.1", int(closed_port.rpartition(":")[2])), _Replies))
        server[0].serve_forever(poll_interval=0.02)

    back = threading.Timer(4, come_back)
    back.start()
    try:
        assert "nothing answers there" in error_of(lambda: store.read_bytes("file")).message
        assert patient.read_bytes("file") == _Server.stored
    finally:
        back.join(0)
        server[0].shutdown()
        back.join()
        server[0].server_close()


@pytest.mark.usefixtures("keys")
def test_a_store_on_its_way_to_a_worker_holds_no_secret() -> None:
    store = open_store("s3://bucket/x", "http://127.0.0.1:1")
    for travelling in (store, store.filesystem):
        assert b"secret" not in pickle.dumps(travelling).replace(b"secret_key", b"")


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionRefusedError("refused"), "the store can't be reached"),
        (TimeoutError("timed out"), "the store can't be reached"),
        (OSError("When writing: AWS Error SLOW_DOWN during PutObject operation"), "fewer requests"),
        (OSError("When writing: AWS Error INTERNAL_FAILURE during PutObject operation"), "out of order"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7"), "nothing answers there"),
        (_os_error(errno.EIO), "Input/output error"),
        (_os_error(errno.ESTALE), "Stale file handle"),
    ],
)
def test_what_may_pass_is_told_as_passing(error: OSError, told: str) -> None:
    explained = explain(error, "here")
    assert explained.passing and told in explained.message


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (_os_error(errno.ENOSPC), "the disk is full"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), "disk is full"),
        (_os_error(errno.EDQUOT), "the disk quota is used up"),
        (_os_error(errno.EROFS), "the file system is read-only"),
        (_os_error(errno.EACCES), "permission denied"),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation"), "denies access"),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject operation"), "no such bucket"),
    ],
)
def test_what_will_not_pass_is_told_as_final(error: OSError, told: str) -> None:
    explained = explain(error, "here")
    assert not explained.passing and told in explained.message
