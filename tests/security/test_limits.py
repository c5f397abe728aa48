"""Small artifacts that ask for much: refused before anything is allocated, unpacked or computed."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

import raycomp
from raycomp.errors import RaycompError
from tests.security.crafted import EXAMPLE, crafted, rezipped

PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
SLACK = 48 * 2**20
"""What an allocator keeps, and libraries that are loaded late."""

MEASURE = """
import json, sys
from pathlib import Path
import raycomp
from raycomp.errors import RaycompError
from raycomp.pipeline.ending.load import stored_conclusion
from raycomp.storage import open_artifact
from tests.security.crafted import fresh

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def everything(uri):
    for use in (lambda: raycomp.load(uri), lambda: raycomp.load(uri, fresh()), lambda: raycomp.load(uri, int8=True),
                lambda: stored_conclusion(open_artifact(uri))):
        try:
            use()
        except RaycompError as error:
            yield type(error).__name__

list(everything(sys.argv[1]))
for uri in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, errors = memory("VmRSS"), list(everything(uri))
    print(json.dumps({"errors": errors, "grown": memory("VmHWM") - before}))
"""


def program(real: Path, change: bytes | Callable[[Any], Any], name: str = PROGRAM) -> dict[str, Any]:
    return {"model.pt2": rezipped((real / "model.pt2").read_bytes(), {name: change})}


def resized(*sizes: int, strides: tuple[int, ...]) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta["sizes"] = [{"as_int": size} for size in sizes]
        meta["strides"] = [{"as_int": stride} for stride in strides]

    return change


def deflated(real: Path) -> bytes:
    """Half a GB of zeros in half a MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO((real / "model.pt2").read_bytes())) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if not name.endswith("weight_0"):
                new.writestr(name, old.read(name))
            else:
                new.compression = zipfile.ZIP_DEFLATED
                with new.open(name, "w", force_zip64=True) as stream:
                    for _ in range(2**6):
                        stream.write(bytes(2**23))
                new.compression = zipfile.ZIP_STORED
    return buffer.getvalue()


def many_entries(real: Path) -> bytes:
    """A directory of a million files, all of them the same bytes."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * 10**6
    return directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(directory), 0, 0)


def hollow_tensors(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": [4 * 10**9], "data_offsets": [0, 16 * 10**9]}}).encode()
    return struct.pack("<Q", len(header)) + header


def hollow_onnx(real: Path) -> bytes:
    model = onnx.load(real / "int8.onnx")
    model.graph.initializer.append(TensorProto(name="hollow", data_type=1, dims=[4 * 10**9]))
    content: bytes = model.SerializeToString()
    return content


def sized(expression: str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        sizes = next(iter(found["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
        sizes[0] = {"as_expr": {"expr_str": expression, "hint": None}}

    return change


def masked(shape: list[int], count: int) -> Callable[[Any], None]:
    def change(plan: Any) -> None:
        mask = {"module": "relu", "target": "_input_0", "shape": shape, "method": "mul"}
        plan["surgeries"][0]["value_masks"] += [mask] * count

    return change


def named_again(plan: Any) -> None:
    """Few coordinates, that thousands of cuts name."""
    plan["keep"] = [list(range(10**5))]
    bias = {"module": "conv", "target": "_output_0", "dim": 1, "size": 10**5, "keep": 0}
    plan["surgeries"][0].update(cuts=[], activations=[bias] * 5000)
    plan["surgeries"][0]["cuts"] = [{"tensor": "gone", "dim": 0, "size": 10**5, "keep": 0}]


def grouped_again(plan: Any) -> None:
    plan["keep"] = [list(range(10**5))]
    cut = {"tensor": "conv.weight", "shape": [10**5, 10**5], "blocks": [[0, 0]] * 10**4}
    plan["surgeries"][0]["block_cuts"] = [cut]


MANY = 10**6
UNKNOWN = {str(number): 0 for number in range(MANY)}


def hollow(found: Any) -> None:
    found["graph_module"]["metadata"] = [[]] * MANY


def arguments(found: Any) -> None:
    found["graph_module"]["graph"]["nodes"][0]["inputs"] += [{"name": "a", "arg": {"as_none": True}}] * MANY


BRACKETS = b"[" * 5000 + b"]" * 5000
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "constants of 16 GB": lambda real: program(real, resized(4 * 10**9, strides=(1,)), WEIGHTS),
    "one element as 16 GB": lambda real: program(real, resized(4 * 10**9, strides=(0,)), WEIGHTS),
    "an archive that unpacks to 1000 times its size": lambda real: {"model.pt2": deflated(real)},
    "a million files": lambda real: {"model.pt2": many_entries(real)},
    "a tower of powers": lambda real: program(real, sized("9**9**9")),
    "a great power": lambda real: program(real, sized("pow(10, 10**8)")),
    "brackets in an expression": lambda real: program(real, sized("(" * 5000 + ")" * 5000)),
    "brackets in a program": lambda real: program(real, BRACKETS),
    "brackets in a plan": lambda real: {"plan.json": BRACKETS},
    "brackets in a calibration": lambda real: {"calibration.json": BRACKETS},
    "brackets in a summary": lambda real: {"summary.json": BRACKETS},
    "weights of 16 GB": lambda real: {"model.safetensors": hollow_tensors("conv.weight")},
    "masks of 16 GB": lambda real: {"masks.safetensors": hollow_tensors("conv.weight")},
    "masks of a plan": lambda real: {"plan.json": masked([10**4, 10**4], 100)},
    "a mask of more than all weights": lambda real: {"plan.json": masked([10**4, 10**4], 1)},
    "a million arguments": lambda real: program(real, arguments),
    "a million lists in a program": lambda real: program(
        real, lambda p: p["graph_module"].update(metadata=[[]] * MANY)
    ),
    "a million lists in a plan": lambda real: {"plan.json": lambda p: p.update(keep=[["x"]] * MANY)},
    "a million wrong ranges": lambda real: {"calibration.json": lambda c: c["targets"].update(fc=[{}] * MANY)},
    "a million wrong numbers": lambda real: {"plan.json": lambda p: p.update(keep=[["x"] * MANY])},
    "a million wrong values of a dict": lambda real: program(
        real, lambda p: p.update(range_constraints={str(number): 0 for number in range(MANY)})
    ),
    "a million wrong figures": lambda real: {
        "summary.json": lambda s: s.update(timings={str(number): "x" for number in range(MANY)})
    },
    "a million wrong targets": lambda real: {
        "calibration.json": lambda c: c.update(targets={str(number): 0 for number in range(MANY)})
    },
    "a million unknown keys of a plan": lambda real: {"plan.json": lambda p: p.update(UNKNOWN)},
    "a million unknown keys of a summary": lambda real: {"summary.json": lambda s: s.update(UNKNOWN)},
    "a million unknown keys of a program": lambda real: program(real, lambda p: p["graph_module"].update(UNKNOWN)),
    "coordinates named by thousands of cuts": lambda real: {"plan.json": named_again},
    "coordinates named by thousands of groups": lambda real: {"plan.json": grouped_again},
    "an ONNX constant of 16 GB": lambda real: {"int8.onnx": hollow_onnx(real)},
}


def test_a_manifest_of_a_hundred_thousand_files_is_one_short_error(real: Path, tmp_path: Path) -> None:
    def change(manifest: Any) -> None:
        record = manifest["files"]["model.pt2"]
        manifest["files"].update({f"../{number}": record for number in range(10**5)})

    with pytest.raises(RaycompError, match="names 100,011 files"):
        raycomp.load(crafted(real, tmp_path / "bad", {"manifest.json": change}))


@pytest.mark.parametrize("place", ["the manifest", "a file's record"])
def test_a_manifest_of_a_million_unknown_keys_is_one_short_error(real: Path, tmp_path: Path, place: str) -> None:
    def change(manifest: Any) -> None:
        (manifest if place == "the manifest" else manifest["files"]["model.pt2"]).update(UNKNOWN)

    with pytest.raises(RaycompError, match="has 1,000,000 unknown keys"):
        raycomp.load(crafted(real, tmp_path / "bad", {"manifest.json": change}))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux")
def test_what_asks_for_much_is_refused_without_memory(real: Path, tmp_path: Path) -> None:
    uris = [crafted(real, tmp_path / str(at), case(real)) for at, case in enumerate(CASES.values())]
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, str(real), *uris], capture_output=True, text=True, timeout=240, check=True
    )
    for name, uri, line in zip(CASES, uris, told.stdout.splitlines(), strict=True):
        found = json.loads(line)
        size = sum(path.stat().st_size for path in Path(uri).iterdir())
        assert len(found["errors"]) == 1, (name, found)
        assert found["grown"] <= 10 * size + SLACK, (name, found)


def computing(target: str, *arguments: tuple[str, dict[str, Any]]) -> Callable[[Any], None]:
    """A program that calls one operator, and returns what it gives."""

    def change(found: Any) -> None:
        graph = found["graph_module"]["graph"]
        given = [{"name": name, "arg": value, "kind": 1} for name, value in arguments]
        results = [{"as_tensor": {"name": "grown"}}]
        node = {"target": target, "inputs": given, "outputs": results, "metadata": {}, "name": "n"}
        graph["nodes"], graph["outputs"] = [node], results

    return change


X = ("self", {"as_tensor": {"name": "x"}})
SIZES = {"as_ints": [10**6, 10**6]}


@pytest.mark.parametrize(
    "change",
    [
        computing("torch.ops.aten.zeros.default", ("size", SIZES)),
        computing("torch.ops.aten.empty.memory_format", ("size", SIZES)),
        computing("torch.ops.aten.full.default", ("size", SIZES), ("fill_value", {"as_int": 1})),
        computing("torch.ops.aten.arange.default", ("end", {"as_int": 10**12})),
        computing("torch.ops.aten.eye.default", ("n", {"as_int": 10**6})),
        computing("torch.ops.aten.new_zeros.default", X, ("size", SIZES)),
        computing("torch.ops.aten.repeat.default", X, ("repeats", {"as_ints": [10**9, 1, 1, 1]})),
        computing("torch.ops.aten.constant_pad_nd.default", X, ("pad", {"as_ints": [10**9, 10**9]})),
        computing("torch.ops.aten.one_hot.default", X, ("num_classes", {"as_int": 10**12})),
    ],
)
def test_a_program_cannot_make_tensors_out_of_proportion(
    real: Path, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    model = raycomp.load(crafted(real, tmp_path / "bad", program(real, change)))
    for _ in range(2):
        with pytest.raises(RaycompError, match=r"would make a tensor of|cannot run|can't be told"):
            model(EXAMPLE)


@pytest.mark.parametrize(
    "target, arguments",
    [
        ("aten.zeros.default", (("size", {"as_ints": [-1]}),)),
        ("aten.select.int", (X, ("dim", {"as_int": 0}), ("index", {"as_int": 10**6}))),
        ("aten.view.default", (X, ("size", {"as_ints": [-5, 2]}))),
    ],
)
def test_sizes_that_are_none_are_one_error(real: Path, tmp_path: Path, target: str, arguments: Any) -> None:
    change = computing(f"torch.ops.{target}", *arguments)
    model = raycomp.load(crafted(real, tmp_path / "bad", program(real, change)))
    with pytest.raises(RaycompError, match="cannot run"):
        model(EXAMPLE)
