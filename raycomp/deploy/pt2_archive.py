"""A `torch.export` archive as a container: which files it may hold, read without torch and without pickle."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass

from raycomp.errors import SpeedupError

WEIGHTS = ("data/weights/", "data/weights/model_weights_config.json", re.compile(r"weight_\d+"))
CONSTANTS = ("data/constants/", "data/constants/model_constants_config.json", re.compile(r"tensor_\d+"))
PROGRAM = "models/model.json"
METADATA = "extra/raycomp.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_NEEDED = (WEIGHTS[1], CONSTANTS[1], PROGRAM, _SAMPLE_INPUTS)
_FILES = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|\.data/\w+"
    r"|extra/[\w.]+"
)
_ENTRY = b"PK\x01\x02"
_MOST_ENTRIES = 100_000


@dataclass(frozen=True)
class Archive:
    """The files of an archive by their names below its one folder, each stored as it is.

    Args:
        where: the archive's name, for errors.
        files: their contents, which share the archive's memory.
    """

    where: str
    files: dict[str, memoryview]


def open_archive(content: bytes, where: str) -> Archive:
    """Passes an archive that holds one exported program, raw tensors, and nothing that torch would unpickle or run.

    Every file is read as it is stored: a compressed one, which could unpack to any size, is refused.

    Args:
        content: the archive's bytes.
        where: its name, for errors.

    Raises:
        SpeedupError: it is no archive, or holds anything else; the message says what.
    """
    files = {}
    for name, start, end in _entries(content, where):
        if name in files:
            raise refused(f"the file {name!r} twice", where)
        if name not in _NEEDED and not _FILES.fullmatch(name):
            raise refused(f"the file {name!r}", where)
        files[name] = memoryview(content)[start:end]
    missing = sorted(set(_NEEDED) - set(files))
    if missing:
        raise not_whole(f"no {missing[0]}", where)
    if files[_SAMPLE_INPUTS]:
        raise refused(f"pickled sample inputs ({_SAMPLE_INPUTS})", where)
    return Archive(where, files)


def refused(what: str, where: str) -> SpeedupError:
    """The error about something that an archive must not hold."""
    return SpeedupError(
        f"refused to load this archive: it holds {what}",
        where=where,
        remedy="raycomp opens archives that it wrote itself (export_pt2), which hold no pickle and no code",
    )


def not_whole(what: str, where: str) -> SpeedupError:
    """The error about an archive that lacks something, or contradicts itself."""
    return SpeedupError(f"this archive has {what}", where=where, remedy="export the model again")


def _entries(content: bytes, where: str) -> list[tuple[str, int, int]]:
    """Each file's name below the archive's folder, and the range of its bytes."""
    # Python's reader takes some hundred bytes of memory for each entry, of which a small file can list millions.
    if content.count(_ENTRY) > _MOST_ENTRIES:
        raise refused("too many files", where)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            infos = opened.infolist()
            bad = next((info for info in infos if info.compress_type or info.file_size != info.compress_size), None)
            if bad is not None:
                raise refused(f"the compressed file {bad.filename[:80]!r}", where)
            if sum(info.file_size for info in infos) > len(content):
                raise refused("files that overlap", where)
            for info in infos:
                with opened.open(info) as stream:
                    while stream.read(2**22):
                        pass  # at its end the checksum is compared
    except SpeedupError:
        raise
    except Exception as error:  # whatever zipfile makes of bytes that are no archive
        raise SpeedupError("this is not a torch.export archive", where=where, remedy=str(error)) from error
    folders = {info.filename.partition("/")[0] for info in infos}
    if len(folders) != 1:
        raise SpeedupError("this is not a torch.export archive", where=where, remedy="it should hold one folder")
    return [(info.filename.partition("/")[2], *_range(content, info)) for info in infos]


def _range(content: bytes, info: zipfile.ZipInfo) -> tuple[int, int]:
    name, extra = (int.from_bytes(content[info.header_offset + at :][:2], "little") for at in (26, 28))
    start = info.header_offset + 30 + name + extra
    return start, start + info.file_size
