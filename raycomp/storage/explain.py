"""One clear cause for what a file system raises."""

from __future__ import annotations

import errno
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from raycomp.errors import StorageError

_LONGEST = 500
_S3_CAUSES: tuple[tuple[str, str, str], ...] = (
    ("signaturedoesnotmatch", "the store refuses the secret (403)", "check AWS_SECRET_ACCESS_KEY"),
    ("invalidaccesskeyid", "the store does not know the access key (403)", "check AWS_ACCESS_KEY_ID"),
    ("expired", "the credentials have expired (403)", "renew AWS_SESSION_TOKEN and its keys"),
    ("tooskewed", "this machine's clock differs too much from the store's", "set the clock"),
    (
        "accessdenied",
        "the store denies access (403)",
        "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they are allowed to do",
    ),
    ("nosuchbucket", "there is no such bucket", "create it, or mend the URI"),
    ("permanentredirect", "the bucket is in another region", "set the region"),
    ("ssl", "the store can't be reached: it does not speak TLS as expected", "http:// or https:// in the endpoint?"),
    ("could not resolve", "the store can't be reached: there is no such host", "check the endpoint"),
    ("timeout was reached", "the store can't be reached: it does not answer in time", "check the endpoint"),
    ("networkconnection", "the store can't be reached: nothing answers there", "check the endpoint"),
)
_LOCAL_CAUSES: dict[int, tuple[str, str]] = {
    errno.EACCES: ("permission denied", "choose a folder that you may write"),
    errno.EPERM: ("permission denied", "choose a folder that you may write"),
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write"),
    errno.ENOTDIR: ("a file is where a folder should be", "choose another folder"),
    errno.EEXIST: ("a file is where a folder should be", "choose another folder"),
    errno.ENOSPC: ("the disk is full", "make room, or choose another disk"),
    errno.ENOENT: ("there is no such file or folder", ""),
}


def explain(error: OSError, where: str) -> StorageError:
    """What happened at a place, as a user can act on it."""
    text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
    codes = text.lower().replace("_", "")
    for mark, message, remedy in _S3_CAUSES:
        if mark in codes:
            return StorageError(message, where=where, remedy=remedy)
    if isinstance(error, ConnectionError | TimeoutError):
        return StorageError(f"the store can't be reached: {text}", where=where, remedy="check the endpoint")
    # Arrow and safetensors raise errors without a number.
    number = error.errno or next((number for number in _LOCAL_CAUSES if os.strerror(number) in text), 0)
    if number in _LOCAL_CAUSES:
        message, remedy = _LOCAL_CAUSES[number]
        return StorageError(message, where=where, remedy=remedy or None)
    return StorageError(text, where=where)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError about `where`."""
    try:
        yield
    except OSError as error:
        raise explain(error, where) from error
