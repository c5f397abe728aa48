"""One clear cause for what a file system raises."""

from __future__ import annotations

import errno
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from raycomp.errors import StorageError

_LONGEST = 500
_S3_FINAL: tuple[tuple[str, str, str], ...] = (
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
)
_S3_PASSING: tuple[tuple[str, str, str], ...] = (
    ("could not resolve", "the store can't be reached: there is no such host", "check the endpoint"),
    ("timeout was reached", "the store can't be reached: it does not answer in time", "check the endpoint"),
    ("networkconnection", "the store can't be reached: nothing answers there", "check the endpoint"),
    ("slowdown", "the store asks for fewer requests (503)", "try again later"),
    ("serviceunavailable", "the store is out of order (503)", "try again later"),
    ("internalfailure", "the store is out of order (500)", "try again later"),
)
_WRITABLE = "choose a folder that you may write"
_LOCAL_FINAL: dict[int, tuple[str, str]] = {
    errno.EACCES: ("permission denied", _WRITABLE),
    errno.EPERM: ("permission denied", _WRITABLE),
    errno.EROFS: ("the file system is read-only", _WRITABLE),
    errno.ENOTDIR: ("a file is where a folder should be", "choose another folder"),
    errno.EISDIR: ("a folder is where a file should be", "choose another folder"),
    errno.EEXIST: ("a file is where a folder should be", "choose another folder"),
    errno.ENOSPC: ("the disk is full", "make room, or choose another disk"),
    errno.EDQUOT: ("the disk quota is used up", "make room, or choose another disk"),
    errno.EFBIG: ("the file is larger than allowed here", "raise the limit (ulimit -f), or choose another disk"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ENOENT: ("there is no such file or folder", ""),
}


def explain(error: OSError, where: str) -> StorageError:
    """What happened at a place, as a user can act on it.

    What is not known to be final (denied, full, missing) counts as passing.
    """
    text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
    codes = text.lower().replace("_", "")
    for causes, passing in ((_S3_FINAL, False), (_S3_PASSING, True)):
        for mark, message, remedy in causes:
            if mark in codes:
                return StorageError(message, where=where, remedy=remedy, passing=passing)
    if isinstance(error, ConnectionError | TimeoutError):
        return StorageError(
            f"the store can't be reached: {text}", where=where, remedy="check the endpoint", passing=True
        )
    # Arrow and safetensors raise errors without a number.
    number = error.errno or next((number for number in _LOCAL_FINAL if os.strerror(number) in text), 0)
    if number in _LOCAL_FINAL:
        message, remedy = _LOCAL_FINAL[number]
        return StorageError(message, where=where, remedy=remedy or None)
    return StorageError(text, where=where, passing=True)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns an OSError of the block, or a name that Arrow doesn't take, into a StorageError about `where`."""
    try:
        yield
    except pa.ArrowInvalid as error:
        text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
        raise StorageError(f"the URI is not right: {text}", where=where) from error
    except OSError as error:
        raise explain(error, where) from error
