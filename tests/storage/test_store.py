"""Places for files: the same behaviour in a local folder and in a real object store."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pytest
from pyarrow import fs

from raycomp.errors import StorageError
from raycomp.storage import Store, open_store
from raycomp.storage.explain import explained
from tests.conftest import ObjectStore


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server: ObjectStore = request.getfixturevalue("object_store_keys")
    return open_store(server.uri(), server.endpoint)


def test_write_read_list_delete(store: Store) -> None:
    store.write_bytes("a.txt", b"one")
    store.write_bytes("below/é 1+2.txt", b"")
    store.write_bytes("a.txt", b"two")
    assert store.read_bytes("a.txt") == b"two"
    assert store.read_bytes("below/é 1+2.txt") == b""
    assert store.files() == ("a.txt", "below/é 1+2.txt")
    assert store.folders() == ("below",)
    assert store.join("below").files() == ("é 1+2.txt",)
    assert (store.size("a.txt"), store.size("none"), store.exists("below")) == (3, None, False)
    store.delete("a.txt")
    assert store.files() == ("below/é 1+2.txt",)
    store.delete_dir("below")
    store.delete_dir("below")
    assert store.files() == ()


def test_big_files_go_in_pieces(store: Store) -> None:
    pieces = [bytes([number]) * 3_000_000 for number in range(5)]
    store.write_chunks("big", iter(pieces))
    assert store.size("big") == 15_000_000
    read = list(store.read_chunks("big"))
    assert len(read) > 1
    assert b"".join(read) == b"".join(pieces)


def test_what_is_not_there(store: Store) -> None:
    assert store.files() == ()
    assert store.folders() == ()
    for act in (store.read_bytes, store.delete):
        with pytest.raises(StorageError, match="there is no such file") as caught:
            act("none.txt")
        assert caught.value.where == store.join("none.txt").uri


def test_create_never_overwrites(store: Store) -> None:
    assert store.create_bytes("é 1.txt", b"first")
    assert not store.create_bytes("é 1.txt", b"second")
    assert store.read_bytes("é 1.txt") == b"first"


def test_of_many_creators_one_wins(store: Store) -> None:
    barrier = Barrier(8)

    def create(number: int) -> bool:
        barrier.wait()
        return store.create_bytes("claim", f"{number}".encode() * 1000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert store.read_bytes("claim") == f"{won.index(True)}".encode() * 1000
    assert store.files() == ("claim",)


def test_check_leaves_nothing(store: Store) -> None:
    store.check()
    assert store.files() == ()
    assert store.folders() == ()


def test_a_uri_brings_everything_back(store: Store) -> None:
    place = store.join("a", "b/c/")
    place.write_bytes("x", b"1")
    again = open_store(place.uri)
    assert again == place
    assert again.read_bytes("x") == b"1"
    assert place.join() is place


def test_a_pickled_store_is_opened_anew_and_holds_no_secret(store: Store) -> None:
    data = pickle.dumps(store)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "nothing").encode() not in data
    assert pickle.loads(data) == store


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write_bytes("a", b"old")

    def pieces() -> object:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_chunks("a", pieces())  # type: ignore[arg-type]
    assert store.read_bytes("a") == b"old"
    assert store.files() == ("a",)


def test_local_places_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store("artifacts").uri == str(tmp_path / "artifacts")
    assert open_store("~/x").path == str(tmp_path / "home" / "x")
    assert open_store(f"file://{tmp_path}/with%20space").path == str(tmp_path / "with space")
    assert open_store(tmp_path / "x") == open_store(str(tmp_path / "x"))
    assert isinstance(open_store("artifacts").filesystem, fs.LocalFileSystem)


def test_pyarrow_spelling_of_an_endpoint(object_store_keys: ObjectStore) -> None:
    host = object_store_keys.endpoint.removeprefix("http://")
    store = open_store(f"s3://{object_store_keys.bucket}//deep/er/?endpoint_override={host}&scheme=http&region=eu-x")
    assert store.path == f"{object_store_keys.bucket}/deep/er"
    assert store.join("z").uri == (
        f"s3://{object_store_keys.bucket}/deep/er/z?endpoint_override={host}&scheme=http&region=eu-x"
    )
    store.check()
    filesystem, path = fs.FileSystem.from_uri(store.uri)
    with filesystem.open_output_stream(f"{path}/by-arrow") as stream:
        stream.write(b"1")
    assert store.files() == ("by-arrow",)


def test_the_endpoint_and_region_of_the_environment(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(object_store.uri())
    store.check()
    assert object_store.endpoint.removeprefix("http://") in store.uri


def test_local_and_remote_files_are_plain(object_store_keys: ObjectStore) -> None:
    """Another reader of the bucket sees the same keys and bytes."""
    store = open_store(object_store_keys.uri("plain"), object_store_keys.endpoint)
    store.write_bytes("a/b.txt", b"1")
    store.create_bytes("a/c d.txt", b"2")
    other = object_store_keys.filesystem()
    for key, content in (("a/b.txt", b"1"), ("a/c d.txt", b"2")):
        assert other.open_input_stream(f"{object_store_keys.bucket}/plain/{key}").read() == content


def test_amazon_is_asked_for_the_region_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyarrow.fs.resolve_s3_region", {"bucket": "eu-north-1"}.pop)
    store = open_store("s3://bucket/x")
    assert store.uri == "s3://bucket/x?region=eu-north-1"
    assert open_store(store.uri) == store
    monkeypatch.setenv("AWS_REGION", "eu-south-2")
    assert open_store("s3://bucket/x").uri == "s3://bucket/x?region=eu-south-2"


def test_an_endpoint_with_credentials_is_refused_wherever_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:VERYSECRET@host")
    with pytest.raises(StorageError, match="holds credentials") as caught:
        open_store("s3://bucket/x")
    assert "VERYSECRET" not in str(caught.value)


def test_what_arrow_does_not_take_as_a_name_is_one_error() -> None:
    with pytest.raises(StorageError, match="the URI is not right") as caught, explained("here"):
        raise pa.ArrowInvalid("no path")
    assert caught.value.where == "here" and not caught.value.passing
