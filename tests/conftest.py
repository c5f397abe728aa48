"""What tests of several parts share: a real object-storage server, and an environment without the developer's keys."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import fs

# More threads than cores make small tests slower, and torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_START_TIMEOUT_S = 90


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server with one bucket, and keys for it."""

    endpoint: str
    bucket: str = "raycomp"
    access_key: str = "raycomp-key"
    secret_key: str = "raycomp-secret"
    reader_access_key: str = "reader-key"
    reader_secret_key: str = "reader-secret"

    def uri(self, prefix: str = "") -> str:
        """A place in the bucket; a new one unless it is named."""
        return f"s3://{self.bucket}/{prefix or uuid.uuid4().hex}"

    def environment(self) -> dict[str, str]:
        """AWS_* variables with the right credentials and the endpoint."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def filesystem(self, *, allow_bucket_creation: bool = False) -> fs.S3FileSystem:
        """Arrow's view of the server, for a test that looks behind raycomp's."""
        return fs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            endpoint_override=self.endpoint.removeprefix("http://"),
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=allow_bucket_creation,
        )


def pytest_configure(config: pytest.Config) -> None:
    """A test run in the background of a shell's script is born deaf to Ctrl-C, which tests send."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_keys_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see the credentials and the cluster that they set themselves, and no others."""
    for name in [name for name in os.environ if name.startswith("AWS_")] + ["RAY_ADDRESS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A SeaweedFS server on free ports, with its data in a folder of its own; started once, killed at the end."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    ports = _free_ports()
    store = ObjectStore(f"http://127.0.0.1:{ports + 3}")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(_server_command(folder, ports, store), stdout=log, stderr=log, cwd=folder)
    try:
        _wait_until_ready(server, store, folder / "log")
        yield store
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def object_store_keys(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The server, with the right credentials in the environment; the endpoint is left for the test to give."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    return object_store


@pytest.fixture
def wrong_secret(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The server, with a right key and a wrong secret in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    return object_store


def _server_command(folder: Path, ports: int, store: ObjectStore) -> list[str]:
    (folder / "data").mkdir()
    (folder / "s3.json").write_text(
        f"""{{"identities": [
            {{"name": "writer", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
              "credentials": [{{"accessKey": "{store.access_key}", "secretKey": "{store.secret_key}"}}]}},
            {{"name": "reader", "actions": ["Read", "List"],
              "credentials": [{{"accessKey": "{store.reader_access_key}", "secretKey": "{store.reader_secret_key}"}}]}}
        ]}}"""
    )
    weed = Path(sys.executable).with_name("weed")
    address = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    numbered = [
        f"-master.port={ports}",
        f"-volume.port={ports + 1}",
        f"-filer.port={ports + 2}",
        f"-s3.port={ports + 3}",
    ]
    s3 = [
        "-s3",
        f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
    ]
    size = ["-master.volumeSizeLimitMB=64", "-volume.max=20", "-master.telemetry=false"]
    logs = ["-logtostderr=true"]
    return [str(weed), *logs, "server", f"-dir={folder / 'data'}", "-filer", *address, *numbered, *s3, *size]


def _free_ports() -> int:
    """The first of four free ports in a row, whose gRPC twins 10000 above are free as well."""
    for _ in range(100):
        first = random.SystemRandom().randrange(20000, 30000)
        if all(_is_free(first + offset + twin) for offset in range(4) for twin in (0, 10000)):
            return first
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_ready(server: subprocess.Popen[bytes], store: ObjectStore, log: Path) -> None:
    """Until the bucket is made and takes a write, which is later than the server's first answer."""
    last: object = None
    for _ in range(_START_TIMEOUT_S * 10):
        try:
            server.wait(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            pass
        port = int(store.endpoint.rpartition(":")[2])
        if _is_free(port):
            continue
        try:
            filesystem = store.filesystem(allow_bucket_creation=True)
            filesystem.create_dir(store.bucket)
            with filesystem.open_output_stream(f"{store.bucket}/ready") as stream:
                stream.write(b"yes")
            return
        except OSError as error:
            last = error
    raise AssertionError(f"SeaweedFS did not start: {last}\n{log.read_text(errors='replace')[-2000:]}")
