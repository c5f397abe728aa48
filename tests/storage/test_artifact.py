"""Artifacts: whole or not there, never overwritten, verified when read; in a folder and in a real object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from raycomp.errors import ArtifactError, StorageError
from raycomp.storage import ArtifactRef, Store, open_artifact, open_store, publish
from tests.conftest import ObjectStore

FIELDS: dict[str, Any] = {"job": "digits", "run": "run-1", "versions": {"torch": "2.13"}, "figures": {"accuracy": 0.98}}


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server: ObjectStore = request.getfixturevalue("object_store_keys")
    return open_store(server.uri(), server.endpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return files(tmp_path / "files", {"model.safetensors": b"weights" * 1000, "sub/report.html": b"", "job.yaml": b"a"})


def files(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class PowerCut(BaseException):
    """Ends a publication as a killed process does: nothing of it tidies up."""


def test_publish_and_fetch(store: Store, folder: Path, tmp_path: Path) -> None:
    ref = publish(store, "run-1", folder, FIELDS)
    artifact = open_artifact(ref.uri)
    assert artifact.names == ("job.yaml", "model.safetensors", "sub/report.html")
    manifest = artifact.manifest
    assert (manifest.format_version, manifest.id, manifest.job, manifest.run) == (1, "run-1", "digits", "run-1")
    assert (manifest.versions, manifest.figures) == (FIELDS["versions"], FIELDS["figures"])
    assert manifest.created.endswith("+00:00")
    record = manifest.files["model.safetensors"]
    assert (record.bytes, record.sha256) == (7000, hashlib.sha256(b"weights" * 1000).hexdigest())
    assert record.path == "model.safetensors"
    fetched = artifact.fetch("sub/report.html", tmp_path / "fetched")
    assert fetched == tmp_path / "fetched" / "sub" / "report.html"
    assert fetched.read_bytes() == b""
    assert artifact.fetch("model.safetensors", tmp_path / "fetched").read_bytes() == b"weights" * 1000
    assert artifact.read_bytes("job.yaml") == b"a"
    assert artifact.uri == ref.uri


def test_the_layout_is_the_files_and_the_manifest(store: Store, folder: Path) -> None:
    publish(store, "run-1", folder, FIELDS)
    assert store.files() == tuple(
        f"run-1/{name}" for name in ("job.yaml", "manifest.json", "model.safetensors", "sub/report.html")
    )
    raw = json.loads(store.read_bytes("run-1/manifest.json"))
    assert list(raw) == ["format_version", "id", "job", "run", "created", "files", "lineage", "versions", "figures"]
    assert set(raw["files"]["job.yaml"]) == {"bytes", "sha256", "path"}


def test_an_id_is_never_overwritten(store: Store, folder: Path, tmp_path: Path) -> None:
    ref = publish(store, "run-1", folder, FIELDS)
    before = {name: store.read_bytes(name) for name in store.files()}
    with pytest.raises(ArtifactError, match="already there, and is never overwritten") as caught:
        publish(store, "run-1", files(tmp_path / "others", {"job.yaml": b"other"}), FIELDS)
    assert caught.value.where == ref.uri
    assert {name: store.read_bytes(name) for name in store.files()} == before


def test_of_racers_one_wins_and_its_artifact_is_whole(store: Store, tmp_path: Path) -> None:
    count = 4
    folders = [
        files(tmp_path / f"racer-{n}", {"a": b"%d" % n * 10_000, "sub/b": b"%d" % n, "c": b""}) for n in range(count)
    ]
    barrier = Barrier(count)

    def race(number: int) -> ArtifactRef | ArtifactError:
        barrier.wait()
        try:
            return publish(store, "run-1", folders[number], FIELDS)
        except ArtifactError as error:
            return error

    for _ in range(2):
        with ThreadPoolExecutor(count) as pool:
            results = list(pool.map(race, range(count)))
        winners = [number for number, result in enumerate(results) if isinstance(result, ArtifactRef)]
        assert len(winners) == 1
        artifact = open_artifact(store.join("run-1").uri)
        for name in artifact.names:
            assert artifact.read_bytes(name) == (folders[winners[0]] / name).read_bytes()
        assert set(store.files()) == {f"run-1/{record.path}" for record in artifact.manifest.files.values()} | {
            "run-1/manifest.json"
        }
        store.delete_dir("run-1")


def cut_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Lets `count` more files be written, and then ends the writer."""
    written: list[str] = []
    write = Store.write_chunks

    def limited(self: Store, name: str, chunks: Iterable[bytes]) -> None:
        if len(written) == count:
            raise error
        written.append(name)
        write(self, name, chunks)

    monkeypatch.setattr(Store, "write_chunks", limited)


@pytest.mark.parametrize("uploaded", [0, 2])
def test_a_publication_cut_short_is_not_there_and_can_be_made_again(
    store: Store, folder: Path, uploaded: int, tmp_path: Path
) -> None:
    others = files(tmp_path / "others", {"job.yaml": b"lost", "more": b"1", "x": b"2"})
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, uploaded, PowerCut())
        with pytest.raises(PowerCut):
            publish(store, "run-1", others, FIELDS)
    with pytest.raises(ArtifactError, match="there is no artifact"):
        open_artifact(store.join("run-1").uri)

    artifact = open_artifact(publish(store, "run-1", folder, FIELDS).uri)
    for name in artifact.names:
        assert artifact.read_bytes(name) == (folder / name).read_bytes()
    paths = {record.path for record in artifact.manifest.files.values()}
    assert set(artifact.store.files()) == paths | {"manifest.json"}


def test_a_publication_that_fails_leaves_nothing(store: Store, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 2, StorageError("the disk is full"))
        with pytest.raises(StorageError, match="disk"):
            publish(store, "run-1", folder, FIELDS)
    assert [name for name in store.files() if name != "run-1/.publishing"] == []


def test_a_manifest_that_could_not_be_written_takes_no_file_away(store: Store, folder: Path) -> None:
    """The write may have happened, or yet happen."""

    def unsure(self: Store, name: str, data: bytes) -> bool:
        if name != "manifest.json":
            return create(self, name, data)
        if arrives:
            create(self, name, data)
        raise StorageError("the store can't be reached")

    create = Store.create_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "create_bytes", unsure)
        arrives = False
        with pytest.raises(StorageError, match="can't be reached"):
            publish(store, "run-1", folder, FIELDS)
        assert store.exists("run-1/model.safetensors")
        arrives = True
        ref = publish(store, "run-2", folder, FIELDS)
    assert open_artifact(ref.uri).read_bytes("model.safetensors") == b"weights" * 1000


def test_a_publisher_that_comes_when_the_winner_just_tidied_up_loses(store: Store, folder: Path) -> None:
    """The claim is free again, and only the manifest tells that the id is taken."""
    publish(store, "run-1", folder, FIELDS)
    with pytest.raises(ArtifactError, match="already there"):
        publish(store, "run-1", folder, FIELDS)
    assert not store.exists("run-1/.publishing")


def test_a_publisher_whose_claim_the_winner_tidies_up_as_it_is_written_loses(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create_bytes

    def lost(self: Store, name: str, data: bytes) -> bool:
        monkeypatch.setattr(Store, "create_bytes", create)
        publish(store, "run-1", folder, FIELDS)
        raise StorageError("there is no such file or folder", where=name)

    monkeypatch.setattr(Store, "create_bytes", lost)
    with pytest.raises(ArtifactError, match="already there"):
        publish(store, "run-1", folder, FIELDS)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"weightS" * 1000, "its sha256 differs"), (b"short", "it has 5 bytes instead of 7000"), (None, "it is missing")],
)
def test_a_file_that_changed_is_refused(
    store: Store, folder: Path, tmp_path: Path, content: bytes | None, told: str
) -> None:
    artifact = open_artifact(publish(store, "run-1", folder, FIELDS).uri)
    if content is None:
        artifact.store.delete("model.safetensors")
    else:
        artifact.store.write_bytes("model.safetensors", content)
    for read in (
        lambda: artifact.fetch("model.safetensors", tmp_path / "x"),
        lambda: artifact.read_bytes("model.safetensors"),
    ):
        with pytest.raises(ArtifactError, match=f"'model.safetensors' is not what was published: {told}"):
            read()
    assert not list((tmp_path / "x").rglob("*"))


def test_a_name_that_is_not_there_names_the_nearest(store: Store, folder: Path, tmp_path: Path) -> None:
    artifact = open_artifact(publish(store, "run-1", folder, FIELDS).uri)
    with pytest.raises(ArtifactError, match=r"it holds no 'model\.safetensor'") as caught:
        artifact.fetch("model.safetensor", tmp_path)
    assert caught.value.remedy == "did you mean 'model.safetensors'?"


def test_no_artifact_lists_those_below(store: Store, folder: Path) -> None:
    publish(store, "run-1", folder, FIELDS)
    publish(store, "run-2", folder, FIELDS)
    with pytest.raises(ArtifactError, match="there is no artifact") as caught:
        open_artifact(store.uri)
    assert caught.value.remedy == "artifacts below it: run-1, run-2"


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "a/../../b",
        "a\\b",
        "c:/x",
        "a//b",
        "./a",
        "..",
        "",
        "a\x00b",
        "a/",
        "manifest.json/..",
    ],
)
def test_a_manifest_with_a_path_trick_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    ref = publish(open_store(str(tmp_path / "store")), "run-1", folder, FIELDS)
    manifest = Path(ref.uri) / "manifest.json"
    for change in (
        {name: {"bytes": 1, "sha256": "0" * 64, "path": "a"}},
        {"a": {"bytes": 1, "sha256": "0" * 64, "path": name}},
    ):
        raw = json.loads(manifest.read_text())
        raw["files"] = change
        manifest.write_text(json.dumps(raw))
        with pytest.raises(ArtifactError, match="the manifest is not right"):
            open_artifact(ref.uri)


def test_a_fetch_does_not_follow_a_link_out_of_its_folder(tmp_path: Path, folder: Path) -> None:
    artifact = open_artifact(publish(open_store(str(tmp_path / "store")), "run-1", folder, FIELDS).uri)
    (tmp_path / "outside").mkdir()
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="outside"):
        artifact.fetch("sub/report.html", tmp_path / "into")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: "not json", "the manifest is not JSON"),
        (lambda raw: json.dumps([]), "the manifest is not right"),
        (lambda raw: json.dumps({**raw, "format_version": 2}), "update raycomp"),
        (lambda raw: json.dumps({**raw, "extra": 1}), "extra: unknown key 'extra'"),
        (lambda raw: json.dumps({key: raw[key] for key in raw if key != "files"}), "the key 'files' is missing"),
        (lambda raw: json.dumps({**raw, "files": {"a": {"bytes": -1, "sha256": "0" * 64, "path": "a"}}}), "got -1"),
        (lambda raw: json.dumps({**raw, "files": {"a": {"bytes": 1, "sha256": "zz", "path": "a"}}}), "got 'zz'"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(tmp_path: Path, folder: Path, change: Any, told: str) -> None:
    ref = publish(open_store(str(tmp_path / "store")), "run-1", folder, FIELDS)
    manifest = Path(ref.uri) / "manifest.json"
    manifest.write_text(change(json.loads(manifest.read_text())))
    with pytest.raises(ArtifactError) as caught:
        open_artifact(ref.uri)
    assert told in str(caught.value)


def test_what_can_not_be_published(tmp_path: Path, folder: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "empty").mkdir()
    for wrong_folder, told in (
        (tmp_path / "empty", "no files to publish"),
        (tmp_path / "nowhere", "no files to publish"),
        (files(tmp_path / "a", {"manifest.json": b""}), "manifest.json is written by the publication"),
        (files(tmp_path / "b", {"a:b": b""}), "not a plain relative file name"),
    ):
        with pytest.raises(ArtifactError, match=told):
            publish(store, "run-1", wrong_folder, FIELDS)
    for artifact_id in ("", "../run", "a/b", ".hidden"):
        with pytest.raises(ArtifactError, match="id: got"):
            publish(store, artifact_id, folder, FIELDS)
    for fields in ({}, {**FIELDS, "figure": {}}, {**FIELDS, "versions": {"torch": 2}}):
        with pytest.raises(ArtifactError, match="the manifest would not be right"):
            publish(store, "run-1", folder, fields)
    assert not (tmp_path / "store").exists()
