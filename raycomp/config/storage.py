"""Where a job keeps what it makes. Credentials are refused here, and never quoted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import AfterValidator

from raycomp.config.base import Conflict, Given, Settings
from raycomp.config.values import Text, nearest, refuse
from raycomp.errors import Problem

_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs")
_GOOGLE = ("endpoint_override", "scheme", "project_id", "retry_limit_seconds")
# Options of hdfs:// are Hadoop's, which are many.
_OPTIONS = {"s3": ("endpoint_override", "scheme", "region"), "gs": _GOOGLE, "gcs": _GOOGLE, "file": ()}


def _storage_uri(uri: str) -> str:
    """Refuses what names no storage, and secrets, which an error must not quote."""
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return _folder(uri)
    parts = _split(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "@" in parts.netloc + options.get("endpoint_override", "") or any(
        re.search("key|secret|token|password", option.lower()) for option in options
    ):
        raise refuse(
            "the URI holds credentials", "take them out; they come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if scheme not in _SCHEMES:
        raise refuse(f"got '{uri}': there is no storage for '{scheme}://'", nearest(scheme, _SCHEMES))
    if scheme == "s3" and not parts.netloc:
        raise refuse(f"got '{uri}': it names no bucket", "should be s3://bucket/prefix")
    if scheme == "s3" and not re.fullmatch(r"[\w.-]+", parts.netloc):
        remedy = "should be s3://bucket/prefix; a store's address is storage.endpoint"
        raise refuse(f"got '{uri}': '{parts.netloc}' is no bucket's name", remedy)
    for option in options:
        if option not in _OPTIONS.get(scheme, options):
            raise refuse(f"the URI has an unknown option '{option}'", nearest(option, _OPTIONS[scheme]))
    return uri


def _split(uri: str) -> SplitResult:
    try:
        return urlsplit(uri)
    except ValueError as error:
        raise refuse(f"got '{uri}': {error}", "brackets stand around an IPv6 address alone") from None


def _folder(path: str) -> str:
    scheme, colon, rest = path.partition(":")
    if colon and scheme.lower() in _SCHEMES:
        raise refuse(f"got '{path}': it is neither a URI nor a folder", f"write {scheme.lower()}://{rest.lstrip('/')}")
    try:
        Path(path).expanduser()
    except RuntimeError:
        user = path.partition("/")[0]
        raise refuse(
            f"got '{path}': there is no user '{user[1:]}'", f"write ./{user} for a folder of this name"
        ) from None
    return path


def _endpoint(endpoint: str) -> str:
    parts = _split(endpoint)
    if "@" in parts.netloc:
        raise refuse("the endpoint holds credentials", "take them out; they come from AWS_* environment variables")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise refuse(f"got '{endpoint}'", "should be http://host:port or https://host:port")
    return endpoint


def deleted_by_ray(where: str, uri: str) -> Problem:
    """What is wrong with storage in the folder that a submitted job runs in."""
    message = f"'{uri}' would lie in the job's own folder on the cluster, which Ray deletes"
    remedy = "an s3:// URI, or an absolute path that all nodes share; --set storage.uri=... does"
    return Problem(where, message, remedy)


class StorageConfig(Settings):
    """Where artifacts and checkpoints go. Credentials come from AWS_* environment variables alone."""

    uri: Annotated[Text, AfterValidator(_storage_uri)] = "artifacts"
    """A folder, or a URI such as s3://bucket/prefix."""
    endpoint: Annotated[Text, AfterValidator(_endpoint)] | None = None
    """The object store's address, http://host:port (null: AWS_ENDPOINT_URL if set, else Amazon's)."""
    region: Text | None = None
    """The object store's region (null: from the environment)."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        uri = given.text("uri") or "artifacts"
        for key in ("endpoint", "region"):
            if not given.has(key):
                continue
            if not uri.startswith("s3://"):
                yield Conflict((key,), "it is for s3:// URIs", "leave it out, or make uri s3://bucket/prefix")
            elif f"{key}_override=" in uri or f"{key}=" in urlsplit(uri).query:
                yield Conflict((key,), "the URI says it, too", "leave one of them out")
