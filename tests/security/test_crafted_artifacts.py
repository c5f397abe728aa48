"""What an attacker writes into an artifact, hashes included, neither runs nor writes anything: it ends in one error."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import raycomp
from raycomp.errors import ArtifactError, RaycompError, SpeedupError
from raycomp.pipeline.ending.load import export, stored_conclusion
from raycomp.storage import open_artifact
from tests.security.crafted import EXAMPLE, crafted, fresh, rezipped

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


def shell(marker: Path) -> str:
    """An expression of Python that leaves a file."""
    return f"__import__('os').system('touch {marker}')"


@contextmanager
def harmless(folder: Path) -> Iterator[Path]:
    """The block ends in one of raycomp's errors with its place, and leaves nothing in the folder."""
    folder.mkdir()
    with pytest.raises(RaycompError) as caught:
        yield folder / "marker"
    assert caught.value.where
    assert list(folder.iterdir()) == []


def test_the_real_artifact_loads_in_every_form(real: Path) -> None:
    alone, own, int8 = raycomp.load(str(real)), raycomp.load(str(real), fresh()), raycomp.load(str(real), int8=True)
    assert alone(EXAMPLE).shape == (2, 3) and torch.allclose(alone(EXAMPLE), own(EXAMPLE), atol=1e-6)
    assert int8(EXAMPLE).shape == (2, 3)
    assert stored_conclusion(open_artifact(str(real))).calibration["fc"]["weight"]["quant_dtype"] == "int8"


# model.pt2: each changes the JSON of the program, given an expression that would leave a file.


def call(program: Any) -> Any:
    return program["graph_module"]["module_call_graph"][0]["signature"]


def graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def first(program: Any) -> Any:
    return graph(program)["nodes"][0]


def spec(kind: str, context: Any) -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    inner = {"type": kind, "context": json.dumps(context), "children_spec": [leaf]}
    nothing = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [nothing, inner]}])


def keys_in_source(program: Any, code: str) -> None:
    call(program).update(forward_arg_names=[], in_spec=spec("builtins.dict", [f"y, z: {code}"]))


def an_argument(value: Any, kind: str = "as_string") -> dict[str, Any]:
    return {"name": "filename", "arg": {kind: value}, "kind": 1}


def calling(target: str, *arguments: dict[str, Any]) -> Callable[[Any, str], None]:
    def change(program: Any, code: str) -> None:
        first(program).update(target=target, inputs=list(arguments))

    return change


def sized(expression: str) -> Callable[[Any, str], None]:
    def change(program: Any, code: str) -> None:
        sizes = next(iter(graph(program)["tensor_values"].values()))["sizes"]
        sizes[0] = {"as_expr": {"expr_str": expression or code, "hint": None}}

    return change


PROGRAMS: dict[str, Callable[[Any, str], None]] = {
    "keys of a dict become source": keys_in_source,
    "an argument's name is source": lambda p, c: call(p).update(forward_arg_names=[f"x={c}"]),
    "fields of a named tuple are source": lambda p, c: call(p).update(
        out_spec=spec("collections.namedtuple", {"f": c})
    ),
    "a type that imports": lambda p, c: call(p).update(in_spec=spec("os.system", [c])),
    "a dataclass": lambda p, c: call(p).update(in_spec=spec("torch.export.Dim", [])),
    "an operator that writes files": calling(
        "torch.ops.aten.from_file.default",
        an_argument("marker"),
        an_argument(True, "as_bool"),
        an_argument(4, "as_int"),
    ),
    "an operator that saves": calling("torch.ops.aten.save.default", an_argument("marker")),
    "an operator that prints": calling("torch.ops.aten._print.default", an_argument("\x1b]52;c;eA==\a")),
    "prims": calling("torch.ops.prims.add.default"),
    "prim": calling("torch.ops.prim.Print.default"),
    "a process group": calling("torch.ops._c10d_functional.all_reduce.default"),
    "a library of one's own": calling("torch.ops.mylib.run.default"),
    "a function of Python": calling("torch.os.system", an_argument("true")),
    "a dunder of an operator": calling("torch.ops.aten.add.__class__"),
    "loading": calling("torch.ops.load_library", an_argument("x.so")),
    "memory of others": calling("torch.ops.aten.set_.source_Storage"),
    "memory that grows": calling("torch.ops.aten.resize_.default"),
    "a method caller": calling("_operator.methodcaller", an_argument("tofile")),
    "an attribute": calling("_operator.attrgetter", an_argument("__class__")),
    "a hook of higher order": calling("torch.ops.higher_order.invoke_subgraph"),
    "a name is source": lambda p, c: first(p).update(name=f"x = {c}"),
    "an input is source": lambda p, c: graph(p)["inputs"][-1]["as_tensor"].update(name=f"x={c}"),
    "a keyword is source": lambda p, c: first(p)["inputs"][0].update(name=f"self={c}, x", kind=2),
    "a path is source": lambda p, c: p["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
        parameter_name=c
    ),
    "a size is code": sized(""),
    "a tower of powers": sized("9**9**9"),
    "a great power": sized("Pow(Integer(10), Integer(100000000))"),
    "a function of Python's own": sized("pow(10, 10)"),
    "nested brackets": sized("(" * 5000 + ")" * 5000),
    "a range's symbol is code": lambda p, c: p["range_constraints"].update({c: {"min_val": 0, "max_val": 1}}),
    "a custom object": lambda p, c: graph(p)["custom_obj_values"].update(x={"name": "x", "class_fqn": "os.system"}),
    "an unknown key": lambda p, c: p.update(code=c),
    "pickled metadata": lambda p, c: first(p)["metadata"].update(custom=c),
    "a nested graph that isn't there": calling(
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        an_argument(False, "as_bool"),
        an_argument("x", "as_operator"),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_crafted_program_is_refused(real: Path, tmp_path: Path, name: str) -> None:
    with harmless(tmp_path / "left") as marker:
        change = rezipped((real / "model.pt2").read_bytes(), {PROGRAM: lambda p: PROGRAMS[name](p, shell(marker))})
        raycomp.load(crafted(real, tmp_path / "bad", {"model.pt2": change}))(EXAMPLE)


@pytest.mark.parametrize(
    "name", ['a"]); code(); ([b"', "a'b", "a\\b", "a\nb", "a\x1b]52;c;eA==\ab", "a\u202eb", "a{b}"]
)
def test_a_tensor_s_name_stays_a_text_in_whatever_source_torch_makes_of_it(
    real: Path, tmp_path: Path, name: str
) -> None:
    def program(found: Any) -> None:
        specs = found["graph_module"]["signature"]["input_specs"]
        weight = next(spec for spec in specs if spec.get("parameter", {}).get("parameter_name") == "conv.weight")
        weight["parameter"]["parameter_name"] = name

    def weights(found: Any) -> None:
        found["config"][name] = found["config"].pop("conv.weight")

    change = rezipped((real / "model.pt2").read_bytes(), {PROGRAM: program, WEIGHTS: weights})
    uri = crafted(real, tmp_path / "bad", {"model.pt2": change})
    with pytest.raises(SpeedupError, match="it holds the tensor"):
        raycomp.load(uri)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def saved(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    return buffer.getvalue()


ARCHIVES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sample inputs": lambda marker: {"data/sample_inputs/model.pt": saved(marker)},
    "a pickled weight": lambda marker: {
        WEIGHTS: lambda c: next(iter(c["config"].values())).update(use_pickle=True),
        "data/weights/weight_0": saved(marker),
    },
    "a pickled weight with another spelling": lambda marker: {
        WEIGHTS: lambda c: next(iter(c["config"].values())).update(use_pickle=1),
    },
    "a custom object": lambda marker: {"data/constants/custom_obj_0": pickle.dumps(Payload(marker))},
    "legacy weights": lambda marker: {"data/weights/model.pt": saved(marker)},
    "native code": lambda marker: {"data/aotinductor/model/x.so": b"\x7fELF"},
    "a second program": lambda marker: {"models/other.json": b"{}"},
    "a path outside": lambda marker: {"../../../marker": b"x"},
    "an absolute path": lambda marker: {str(marker): b"x"},
    "a weight from outside": lambda marker: {
        WEIGHTS: lambda c: next(iter(c["config"].values())).update(path_name="../../../../etc/passwd")
    },
    "a description with code": lambda marker: {
        "extra/raycomp.json": lambda d: d["signature"]["outputs"].update(
            kind="tuple", items=[], name="x", fields=["a=1"]
        )
    },
    "a description of other outputs": lambda marker: {
        "extra/raycomp.json": lambda d: d["signature"].update(outputs={"kind": "tuple", "items": []})
    },
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_crafted_archive_is_refused(real: Path, tmp_path: Path, name: str) -> None:
    with harmless(tmp_path / "left") as marker:
        change = rezipped((real / "model.pt2").read_bytes(), ARCHIVES[name](marker))
        raycomp.load(crafted(real, tmp_path / "bad", {"model.pt2": change}))


# plan.json: each changes the rewritten forward, or the cuts.


def node(op: str, target: str, *args: Any, name: str = "evil", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def before_output(*nodes: dict[str, Any]) -> Callable[[Any, str], None]:
    def change(plan: Any, code: str) -> None:
        plan["surgeries"][0]["graph"]["nodes"][-1:-1] = nodes

    return change


def nodes(plan: Any) -> Any:
    return plan["surgeries"][0]["graph"]["nodes"]


def surgery(plan: Any) -> Any:
    return plan["surgeries"][0]


X = {"node": "x"}
PLANS: dict[str, Callable[[Any, str], None]] = {
    "a placeholder is source": lambda p, c: nodes(p)[0].update(name=f"x={c}", target=f"x={c}"),
    "a method that writes": before_output(node("call_method", "numpy", X), node("call_method", "tofile", "marker")),
    "an operator that writes": before_output(node("call_function", "aten.from_file", "marker", True, 4)),
    "an operator of another namespace": before_output(node("call_function", "prim.Print", "x")),
    "an operator of no namespace": before_output(node("call_function", "os.system", "touch marker")),
    "a keyword is source": before_output(node("call_function", "aten.relu.default", X, **{"x=print(1)": 1})),
    "an attribute of the class": before_output(node("get_attr", "__class__")),
    "an attribute below": before_output(node("get_attr", "conv.forward.__globals__")),
    "a layer that isn't one": before_output(node("call_module", "conv.forward", X)),
    "the model itself": before_output(node("call_module", "", X)),
    "a layer that the model lacks": before_output(node("call_module", "os", X)),
    "an unknown kind of value": before_output(node("call_function", "aten.relu.default", {"eval": "1"})),
    "an attribute of torch": before_output(node("call_function", "aten.relu.default", {"torch": "os"})),
    "a node that isn't there": before_output(node("call_function", "aten.relu.default", {"node": "nowhere"})),
    "two nodes of one name": before_output(node("call_function", "aten.relu.default", X, name="x")),
    "no output": lambda p, c: nodes(p).pop(),
    "a constant's name": lambda p, c: surgery(p)["graph"]["constants"].update(
        __class__={"shape": [1], "dtype": "float32"}
    ),
    "a constant's type": lambda p, c: surgery(p)["graph"]["constants"].update(
        raycomp_constant_0={"shape": [1], "dtype": "os"}
    ),
    "a constant of terabytes": lambda p, c: surgery(p)["graph"]["constants"].update(
        raycomp_constant_0={"shape": [10**6, 10**6], "dtype": "float32"}
    ),
    "a mask of terabytes": lambda p, c: surgery(p)["value_masks"].append(
        {"module": "relu", "target": "_input_0", "shape": [10**6, 10**6], "method": "mul"}
    ),
    "a bias of terabytes": lambda p, c: surgery(p)["biases"].append({"module": "conv", "size": 2**31 - 1}),
    "an attribute of Python's own": lambda p, c: surgery(p)["attributes"].append(
        {"module": "conv", "name": "__class__", "old": 6, "new": 4}
    ),
    "a size that grows": lambda p, c: surgery(p)["attributes"].append(
        {"module": "conv", "name": "stride", "old": 1, "new": 2**31 - 1}
    ),
    "a flag as a size": lambda p, c: surgery(p)["attributes"].append(
        {"module": "", "name": "training", "old": 1, "new": 0}
    ),
    "a tensor that is a method": lambda p, c: surgery(p)["cuts"][0].update(tensor="conv.forward"),
    "coordinates beyond": lambda p, c: p["keep"].__setitem__(0, [0, 1, 2, 3, 4, 5, 6, 7]),
    "coordinates below": lambda p, c: p["keep"].__setitem__(0, [-1, 2, 3, 5]),
    "coordinates twice": lambda p, c: p["keep"].__setitem__(0, [0, 0, 0, 0]),
    "a cut again and again": lambda p, c: surgery(p).update(cuts=surgery(p)["cuts"][:1] * 1000),
    "an unknown key": lambda p, c: surgery(p).update(code=c),
    "a number as text": lambda p, c: surgery(p)["cuts"][0].update(dim="0"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_crafted_plan_is_refused(real: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with harmless(tmp_path / "left") as marker:
        monkeypatch.chdir(marker.parent)
        bad = crafted(real, tmp_path / "bad", {"plan.json": lambda p: PLANS[name](p, shell(marker))})
        raycomp.load(bad, fresh())(EXAMPLE)


def test_no_source_is_generated_from_an_artifact(real: Path) -> None:
    for model in (None, fresh()):
        raycomp.load(str(real), model)  # what is imported the first time is compiled
    compiled: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("compile", "exec", "eval"):
            patch.setattr(f"builtins.{name}", lambda source, *args, **kwargs: compiled.append(source))
        alone, own = raycomp.load(str(real)), raycomp.load(str(real), fresh())
        same = torch.allclose(alone(EXAMPLE), own(EXAMPLE))
    assert compiled == [] and same


# The other files.


def onnx_model(real: Path, change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load(real / "int8.onnx")
    change(model)
    content: bytes = model.SerializeToString()
    return content


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "/etc/passwd"), ("length", "4")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def looping(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["evil"], body=body))


def huge(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="evil", data_type=1, dims=[10**5, 10**5]))


def function(model: onnx.ModelProto) -> None:
    identity = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("evil", "f", ["a"], ["b"], [identity], [helper.make_opsetid("", 21)]))


def library(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))
    model.graph.node.append(helper.make_node("PyOp", [], ["evil"], domain="ai.onnx.contrib"))


def described(model: onnx.ModelProto) -> None:
    found = next(entry for entry in model.metadata_props if entry.key == "raycomp")
    content = json.loads(found.value)
    content["signature"]["inputs"]["items"]["x"] = {"kind": "tuple", "items": [], "name": "a", "fields": ["__import__"]}
    found.value = json.dumps(content)


@pytest.mark.parametrize("change", [external, looping, huge, function, library, described])
def test_a_crafted_onnx_model_is_refused(real: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    with harmless(tmp_path / "left"):
        raycomp.load(crafted(real, tmp_path / "bad", {"int8.onnx": onnx_model(real, change)}), int8=True)


def test_constants_of_an_onnx_model_are_not_blown_up_while_it_loads(real: Path, tmp_path: Path) -> None:
    def grow(model: onnx.ModelProto) -> None:
        for name, shape in (("column", (40000, 1)), ("row", (1, 40000))):
            ones = torch.ones(shape).numpy()
            model.graph.initializer.append(numpy_helper.from_array(ones, name))
        model.graph.node.append(helper.make_node("Add", ["column", "row"], ["grown"]))
        model.graph.output.append(helper.make_tensor_value_info("grown", 1, None))

    with harmless(tmp_path / "left"):  # one output more than the signature has
        raycomp.load(crafted(real, tmp_path / "bad", {"int8.onnx": onnx_model(real, grow)}), int8=True)


def test_weights_that_do_not_fit_are_one_error(real: Path, tmp_path: Path) -> None:
    header = json.dumps({"conv.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = struct.pack("<Q", len(header)) + header + b"\0\0\0\0"
    bad = crafted(real, tmp_path / "bad", {"model.safetensors": content})
    with pytest.raises(ArtifactError, match="weights don't fit the model"):
        raycomp.load(bad, fresh())


def test_another_class_than_was_compressed_is_told(real: Path) -> None:
    with pytest.raises(SpeedupError, match="the plan names"):
        raycomp.load(str(real), nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name, change",
    [
        ("calibration.json", lambda c: c["targets"]["fc"]["weight"].update(scale="__import__('os')")),
        ("calibration.json", lambda c: c["targets"]["fc"]["weight"].pop("scale")),
        ("calibration.json", lambda c: c["targets"]["fc"]["weight"].update(scale=[[1.0], [1.0, 2.0]])),
        ("calibration.json", lambda c: [c]),
        ("calibration.json", b"[" * 5000),
        ("summary.json", lambda s: s.update(code="x")),
        ("summary.json", b"[" * 5000),
        ("masks.safetensors", b"\xff" * 8),
    ],
)
def test_a_crafted_record_is_one_error(real: Path, tmp_path: Path, name: str, change: Any) -> None:
    with harmless(tmp_path / "left"):
        stored_conclusion(open_artifact(crafted(real, tmp_path / "bad", {name: change})))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"../../marker": m["files"]["model.pt2"]}),
        lambda m: m["files"]["model.pt2"].update(path="../../../etc/passwd"),
        lambda m: m["files"]["model.pt2"].update(path="/etc/passwd"),
        lambda m: m["files"]["model.pt2"].update(bytes=10**30),
        lambda m: m.update(files=[]),
        lambda m: [m],
    ],
)
def test_a_crafted_manifest_is_one_error(real: Path, tmp_path: Path, change: Any) -> None:
    with harmless(tmp_path / "left"):
        uri = crafted(real, tmp_path / "bad", {"manifest.json": change})
        export(uri, "pt2", tmp_path / "left")


def test_a_manifest_of_brackets_is_one_error(real: Path, tmp_path: Path) -> None:
    uri = crafted(real, tmp_path / "bad", {})
    for content in (b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"", b"1e999999"):
        (Path(uri) / "manifest.json").write_bytes(content)
        with pytest.raises(ArtifactError, match="manifest"):
            raycomp.load(uri)
