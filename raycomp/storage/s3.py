"""S3 and what speaks like it: where a URI points, with which credentials, and the one write that Arrow lacks."""

from __future__ import annotations

import configparser
import hashlib
import hmac
import http.client
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from pyarrow import fs

from raycomp.errors import StorageError

_CONNECT_TIMEOUT_S = 3
_PUT_TIMEOUT_S = 10
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_OTHER_CREDENTIALS = (
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_SECRETS = (*_KEYS, "AWS_SESSION_TOKEN")
_PLACES = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_EC2_METADATA_DISABLED")


def environment(*, credentials: bool) -> dict[str, str]:
    """The variables of this process's environment with which one elsewhere reaches the same stores.

    Args:
        credentials: whether the keys are among them, or the other process has its own.
    """
    names = (*_SECRETS, *_PLACES) if credentials else _PLACES
    return {name: os.environ[name] for name in names if name in os.environ}


def secrets_in(variables: Iterable[str]) -> tuple[str, ...]:
    """Those of some variables that hold secrets."""
    return tuple(name for name in variables if name in _SECRETS)


@dataclass(frozen=True)
class S3Location:
    """A place in an S3 store.

    Args:
        path: the bucket and, behind a slash, the prefix.
        host: the endpoint's host and port; None for Amazon's own.
        scheme: http or https.
        region: the store's region.
    """

    path: str
    host: str | None
    scheme: str
    region: str | None

    @property
    def uri(self) -> str:
        """The place with all that is needed to come back to it, as pyarrow spells it, without credentials."""
        options = {"endpoint_override": self.host, "scheme": self.scheme if self.host else None, "region": self.region}
        query = urlencode({key: value for key, value in options.items() if value}, safe=":/")
        return f"s3://{self.path}" + (f"?{query}" if query else "")


def locate(uri: str, endpoint: str | None, region: str | None) -> S3Location:
    """Where a URI points; what it leaves open comes from the arguments, then from AWS_* variables.

    Raises:
        StorageError: the URI or the endpoint holds credentials, which would stand in every place that names the store.
    """
    parts = urlsplit(uri, allow_fragments=False)
    options = dict(parse_qsl(parts.query))
    endpoint = (
        endpoint
        or options.get("endpoint_override")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
    )
    if "@" in parts.netloc + (endpoint or ""):
        remedy = f"they come from {' and '.join(_KEYS)}"
        raise StorageError("the storage's URI or endpoint holds credentials", where="storage", remedy=remedy)
    scheme, host = options.get("scheme", "https"), endpoint
    if endpoint and "://" in endpoint:
        scheme, _, host = endpoint.rstrip("/").partition("://")
    region = (
        region or options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    )
    path = "/".join(part for part in (parts.netloc + parts.path).split("/") if part)
    return S3Location(path, host, scheme, region or ("us-east-1" if host else None))


def with_region(location: S3Location) -> S3Location:
    """The location with the region that Amazon says its bucket is in, where nothing else says it.

    Raises:
        OSError: Amazon can't be asked, or has no such bucket.
    """
    if location.region:
        return location
    return replace(location, region=fs.resolve_s3_region(location.path.partition("/")[0]))


def require_credentials(location: S3Location) -> None:
    """Raises StorageError if there are no credentials in the environment or in AWS's file of them.

    Amazon's own store may also take those of the machine's role, which only a request shows.
    """
    if can_sign() or any(os.environ.get(key) for key in _OTHER_CREDENTIALS):
        return
    missing = [key for key in _KEYS if not os.environ.get(key)]
    if len(missing) == len(_KEYS) and location.host is None:
        return
    raise StorageError(
        f"there are no credentials: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set",
        where=location.uri,
        remedy="set the AWS_* variables in the environment, or AWS_SHARED_CREDENTIALS_FILE",
    )


class RetryingS3(fs.S3FileSystem):
    """Arrow's file system, which is pickled with its place and its patience, and without secrets.

    It makes no request yet. A request that fails for a passing reason is repeated after 1, 2, 4, … seconds, 20 at most.

    Args:
        location: where.
        request_timeout_s: seconds for one request.
        attempts: how often a request is tried: 3 take a second where nobody answers, 9 a minute.
    """

    def __init__(self, location: S3Location, request_timeout_s: float = 30, attempts: int = 3) -> None:
        super().__init__(
            region=location.region,
            endpoint_override=location.host,
            scheme=location.scheme,
            connect_timeout=_CONNECT_TIMEOUT_S,
            request_timeout=request_timeout_s,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        )
        self.location, self.request_timeout_s, self.attempts = location, request_timeout_s, attempts

    def __reduce__(self) -> tuple[object, ...]:
        return RetryingS3, (self.location, self.request_timeout_s, self.attempts)


def can_sign() -> bool:
    """Whether the keys themselves are at hand, so that a request can be signed here."""
    return all(_credentials().get(key) for key in _KEYS)


def _credentials() -> Mapping[str, str]:
    """The secrets by their variables' names: the environment's, else those of AWS's file (often a mounted one)."""
    if all(os.environ.get(key) for key in _KEYS):
        return os.environ
    file = configparser.RawConfigParser()
    with suppress(OSError, RuntimeError, configparser.Error):
        file.read(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path("~/.aws/credentials").expanduser())
    profile = os.environ.get("AWS_PROFILE", "default")
    return {name.upper(): value for name, value in file.items(profile)} if file.has_section(profile) else {}


def delay_s(attempt: int) -> float:
    """Seconds to wait after an attempt, counted from 0, that failed for a passing reason."""
    return min(0.25 * 2**attempt, 20.0)


class InDoubtError(ConnectionError):
    """A write of which it is not known whether it happened."""


def put_if_absent(location: S3Location, path: str, data: bytes) -> bool:
    """Creates an object unless it exists: a PUT with If-None-Match, which pyarrow does not offer.

    Args:
        path: the bucket and the object's key.

    Returns:
        Whether the object was created.

    Raises:
        InDoubtError: the request failed, and may or may not have created the object.
        OSError: the store refuses the request.
    """
    host = location.host or f"s3.{location.region}.amazonaws.com"
    target = "/" + quote(path, safe="/-_.~")
    headers = {"If-None-Match": "*", **_signature(host, location.region or "us-east-1", target, data)}
    kind = http.client.HTTPSConnection if location.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, timeout=_PUT_TIMEOUT_S)
    try:
        connection.request("PUT", target, body=data, headers=headers)
        response = connection.getresponse()
        text = " ".join(response.read().decode(errors="replace").split())
    except (OSError, http.client.HTTPException) as error:
        raise InDoubtError(str(error) or type(error).__name__) from error
    finally:
        connection.close()
    if response.status in (200, 412):
        return response.status == 200
    refusal = f"it answers {response.status} {response.reason}: {text[:300]}"
    raise InDoubtError(refusal) if response.status == 409 or response.status >= 500 else OSError(refusal)


def _signature(host: str, region: str, target: str, data: bytes) -> dict[str, str]:
    """The headers of AWS Signature Version 4 for a PUT without a query."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(data).hexdigest()
    signed = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": now}
    credentials = _credentials()
    if token := credentials.get("AWS_SESSION_TOKEN"):
        signed["x-amz-security-token"] = token
    names = ";".join(signed)
    fields = "".join(f"{name}:{value}\n" for name, value in signed.items())
    request = "\n".join(("PUT", target, "", fields, names, digest))
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    summary = "\n".join(("AWS4-HMAC-SHA256", now, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{credentials['AWS_SECRET_ACCESS_KEY']}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, summary.encode(), hashlib.sha256).hexdigest()
    scoped = f"{credentials['AWS_ACCESS_KEY_ID']}/{scope}"
    signed["Authorization"] = f"AWS4-HMAC-SHA256 Credential={scoped}, SignedHeaders={names}, Signature={signature}"
    return signed
