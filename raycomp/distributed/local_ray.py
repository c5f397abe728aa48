"""The Ray that a job starts for itself: it listens on loopback alone, and answers nobody who lacks its token."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from raycomp.storage import scratch

QUIET: dict[str, Any] = {"configure_logging": True, "logging_level": logging.ERROR, "log_to_driver": False}
_FOLDER = "RAYCOMP_LOCAL_RAY"
_LOOPBACK = "127.0.0.1"


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Within the block, this process is connected to a Ray that it has started, with that many CPUs.

    Its processes inherit this one's environment, so that secrets need no place in Ray's own settings, which Ray logs.
    """
    with scratch() as folder, _authenticated(_settings(folder)):
        try:
            with _on_loopback():
                ray.init(
                    address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address=_LOOPBACK, **QUIET
                )
            yield
        finally:
            ray.shutdown()


def local_folder() -> Path | None:
    """In each process of a Ray that a job has started: a folder of its user alone; None elsewhere."""
    folder = os.environ.get(_FOLDER)
    return Path(folder) if folder else None


def _settings(folder: Path) -> dict[str, str | None]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {
        _FOLDER: str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": None,  # Ray would prefer it to the path.
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }


@contextmanager
def _authenticated(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Within the block, the environment has these settings (None: is without), and Ray has read them."""
    before = {name: os.environ.get(name) for name in settings}
    _apply(settings)
    try:
        yield
    finally:
        _apply(before)


def _apply(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # Ray reads its mode when it is imported, and keeps a token that it has seen.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """On Linux, Ray replaces 127.0.0.1 by the machine's address, unless it believes that there are no clusters."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
