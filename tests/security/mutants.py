"""Random changes to every file of an artifact, as a seed draws them; hashes are computed anew."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import raycomp
from raycomp.errors import RaycompError
from raycomp.pipeline.ending import artifact as files
from raycomp.pipeline.ending.load import stored_conclusion
from raycomp.storage import open_artifact
from tests.security.crafted import EXAMPLE, crafted, fresh, rezipped

_VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2, 7, 10**6, 2**31, 2**63, 10**12, 10**30, -(2**63), 0.5, float("inf"), float("nan")),
    *("", "x", "__class__", "x=print(1)", "../x", "\x1b]52;c;eA==\a", "aten.from_file.default", "9**9**9", "x" * 4000),
    *([], {}, [[]], {"": []}, ["x"], {"node": "x"}, {"as_int": 10**12}),
)
_JSON = (files.PLAN, files.CALIBRATION, files.SUMMARY, "manifest.json")
_BYTES = (*_JSON, files.MODEL, files.MASKS, files.PROGRAM, files.INT8)
_IN_ARCHIVE = ("models/model.json", "data/weights/model_weights_config.json", "extra/raycomp.json")


def mutant(real: Path, target: Path, seed: int) -> tuple[str, str]:
    """A changed copy of an artifact; returns its place and what was changed."""
    draw = random.Random(seed)
    way = draw.choice(("json", "archive", "archive", "bytes", "zip"))
    if way == "json":
        name = draw.choice(_JSON)
        return crafted(real, target, {name: lambda value: changed_json(value, draw)}), name
    if way == "archive":
        inside = draw.choice(_IN_ARCHIVE)
        content = (real / files.PROGRAM).read_bytes()
        archive = rezipped(content, {inside: lambda value: changed_json(value, draw)})
        return crafted(real, target, {files.PROGRAM: archive}), inside
    if way == "zip":
        return crafted(real, target, {files.PROGRAM: _changed_zip((real / files.PROGRAM).read_bytes(), draw)}), "zip"
    name = draw.choice(_BYTES)
    content = changed_bytes((real / name).read_bytes(), draw)
    uri = crafted(real, target, {} if name == "manifest.json" else {name: content})
    if name == "manifest.json":
        (target / name).write_bytes(content)
    return uri, f"bytes of {name}"


def outcome(uri: str) -> str:
    """How loading, running and reading it ends: "error" or "loaded"; anything but one of raycomp's errors is raised."""
    found = []
    for load in (
        lambda: raycomp.load(uri),
        lambda: raycomp.load(uri, fresh()),
        lambda: raycomp.load(uri, int8=True),
    ):
        try:
            with torch.no_grad():
                found.append(load()(EXAMPLE))
        except RaycompError as error:
            assert error.where, repr(error)
        except TypeError as error:  # a signature that takes other arguments
            assert any(told in str(error) for told in ("expected a", "program takes", "forward()")), repr(error)
    try:
        stored_conclusion(open_artifact(uri))
    except RaycompError:
        return "error"
    return "error" if len(found) < 3 else "loaded"


def changed_json(value: Any, draw: random.Random) -> Any:
    """The document with one or two places deleted, replaced, renamed, doubled or swapped."""
    for _ in range(draw.choice((1, 1, 1, 2))):
        places = [*_places(value)]
        if not places:
            return draw.choice(_VALUES)
        container, key = draw.choice(places)
        way = draw.choice(("replace", "replace", "delete", "nudge", "rename", "double", "swap"))
        if way == "replace":
            container[key] = draw.choice(_VALUES)
        elif way == "delete":
            del container[key]
        elif way == "nudge":
            container[key] = _nudged(container[key], draw)
        elif way == "rename" and isinstance(container, dict):
            container[str(draw.choice(_VALUES))[:50]] = container.pop(key)
        elif way == "double" and isinstance(container, list):
            container[key:key] = [container[key]] * draw.choice((1, 1000))
        else:
            other, where = draw.choice(places)
            container[key], other[where] = json.loads(json.dumps(other[where])), json.loads(json.dumps(container[key]))
    return value


def _places(value: Any) -> Any:
    todo = [value]
    while todo:
        each = todo.pop()
        keys = each if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            yield each, key
            todo.append(each[key])


def _nudged(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice((-value, value + 1, value - 1, value * 1000, float(value)))
    if isinstance(value, str) and value:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice(("'", "(", "\x00", "é", ".", "_", value)) + value[at:]
    return [value]


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """The bytes with some of them changed, cut out or repeated."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 3, 30))):
        at = draw.randrange(len(changed)) if changed else 0
        way = draw.choice(("flip", "flip", "cut", "insert", "number"))
        if way == "flip" and changed:
            changed[at] = draw.randrange(256)
        elif way == "cut":
            del changed[at : at + draw.choice((1, 8, 4000))]
        elif way == "insert":
            changed[at:at] = draw.choice((b"[" * 300, b"\xff" * 8, b"\x00", b'"'))
        else:
            changed[at : at + 8] = np.uint64(draw.choice((0, 1, 2**31, 2**40, 2**63 - 1))).tobytes()
    return bytes(changed)


def _changed_zip(content: bytes, draw: random.Random) -> bytes:
    """The archive compressed, with an entry renamed, doubled or left out, or with bytes changed that keep their sum."""
    way = draw.choice(("compress", "rename", "leave out", "bytes"))
    if way == "compress":
        return rezipped(content, {}, draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = draw.choice(old.namelist())
        for name in old.namelist():
            data = old.read(name)
            if name == chosen and way == "leave out":
                continue
            if name == chosen and way == "bytes":
                data = changed_bytes(data, draw)
            new.writestr(
                f"{name}{draw.choice(('x', '/..', '.pt'))}" if name == chosen and way == "rename" else name, data
            )
    return buffer.getvalue()
