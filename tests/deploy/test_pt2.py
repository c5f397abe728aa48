from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.export.pt2_archive import constants

from raycomp.deploy.pt2 import export_pt2, load_pt2
from raycomp.deploy.pt2_schema import PROGRAM
from raycomp.errors import SpeedupError
from raycomp.storage.documents import parse_document
from tests.deploy.networks import ResidualNet, randomize_norms_


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def torch_save(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.pt2"
    torch.manual_seed(0)
    export_pt2(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4), path)
    return path


def rewrite(source: Path, target: Path, files: dict[str, bytes | Callable[[Any], Any]]) -> Path:
    """A copy of an archive with some files replaced, added, or (JSON) edited."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        contents = {name.removeprefix(f"{root}/"): old.read(name) for name in old.namelist()}
        for name, change in files.items():
            contents[name] = change if isinstance(change, bytes) else edit(contents[name], change)
        for name, content in contents.items():
            new.writestr(f"{root}/{name}", content)
    return target


def edit(content: bytes, change: Callable[[Any], Any]) -> bytes:
    value = json.loads(content)
    change(value)
    return json.dumps(value).encode()


def test_an_archive_runs_without_its_source_for_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize_norms_(ResidualNet())
    report = export_pt2(model, torch.randn(1, 3, 16, 16), tmp_path / "model.pt2")
    loaded = load_pt2(tmp_path / "model.pt2").train().eval()
    assert report.dynamic_batch and loaded.metadata["dynamic_batch"]
    assert Version(loaded.metadata["versions"]["torch"]).release == Version(torch.__version__).release
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 16, 16)
        with torch.no_grad():
            assert torch.allclose(loaded(x), model(x), atol=1e-6)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 2, 4).sum(1)


def test_a_baked_in_batch_is_reported(tmp_path: Path) -> None:
    assert not export_pt2(Fixed(), torch.randn(3, 8), tmp_path / "model.pt2").dynamic_batch
    loaded = load_pt2(tmp_path / "model.pt2")
    assert loaded(torch.randn(3, 8)).shape == (3, 4)
    with pytest.raises(RuntimeError, match="to be equal to 3, but got 6"):
        loaded(torch.randn(6, 8))


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: Tensor) -> dict[str, Any]:
        hidden = self.conv(self.embed(ids).transpose(1, 2)) * scale
        if mask is not None:
            hidden = hidden * mask[:, None]
        chunks = hidden.view(hidden.shape[0], 2, -1).chunk(2, 1)
        return {"logits": hidden.mean(2), "parts": (chunks[0], chunks[1])}


def test_keywords_and_nested_outputs(tmp_path: Path) -> None:
    model = Structured().eval()
    example = {"ids": torch.randint(9, (3, 6)), "mask": torch.ones(3, 6), "scale": torch.tensor(2.0)}
    export_pt2(model, example, tmp_path / "model.pt2")
    bigger = {"ids": torch.randint(9, (5, 6)), "mask": torch.rand(5, 6), "scale": torch.tensor(0.5)}
    expected, loaded = model(**bigger), load_pt2(tmp_path / "model.pt2")(**bigger)
    assert torch.allclose(loaded["logits"], expected["logits"], atol=1e-6)
    assert torch.allclose(loaded["parts"][1], expected["parts"][1], atol=1e-6)


def test_an_argument_that_only_the_class_takes_is_named_with_the_way_to_it(archive: Path) -> None:
    """Its class may take `labels`; the program was exported without them."""
    told = r"takes input, and got labels; .*raycomp\.load\(uri, model\)"
    with pytest.raises(TypeError, match=told):
        load_pt2(archive)(torch.randn(2, 4), labels=torch.zeros(2))
    with pytest.raises(TypeError, match=r"takes input, and needs input$"):
        load_pt2(archive)()


def test_the_archive_holds_neither_pickles_nor_paths(archive: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        contents = {name: opened.read(name) for name in opened.namelist()}
    assert [content for name, content in contents.items() if "sample_inputs" in name] == [b""]
    assert not any(b"stack_trace" in content or b".py" in content for content in contents.values())


def test_the_float_model_is_left_alone(tmp_path: Path) -> None:
    model = nn.Linear(4, 3).double().train()
    export_pt2(model, torch.randn(2, 4).double(), tmp_path / "model.pt2")
    assert model.training and model.weight.dtype == torch.float64 and model.weight.requires_grad
    assert load_pt2(tmp_path / "model.pt2")(torch.randn(2, 4)).dtype == torch.float32


def pickled_weight(config: Any) -> None:
    config["config"]["0.weight"]["use_pickle"] = True


def test_torch_itself_would_run_the_payloads(archive: Path, tmp_path: Path) -> None:
    payloads = pickles(tmp_path / "made")
    if not hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX"):
        del payloads["opaque constant"]  # older versions of torch don't know the kind
    for count, files in enumerate(payloads.values()):
        bad = rewrite(archive, tmp_path / f"{count}.pt2", files)
        with contextlib.suppress(Exception):  # what it makes of the payload's result does not matter
            torch.export.load(bad)
        assert (tmp_path / "made").is_dir(), files
        (tmp_path / "made").rmdir()


def pickles(folder: Path) -> dict[str, dict[str, Any]]:
    saved = torch_save(Payload(folder))
    constants = "data/constants/model_constants_config.json"
    opaque = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    return {
        "sample inputs": {"data/sample_inputs/model.pt": saved},
        "flagged weight": {"data/weights/model_weights_config.json": pickled_weight, "data/weights/weight_0": saved},
        "opaque constant": {
            constants: lambda config: config["config"].update(c=opaque),
            "data/constants/opaque_obj_0": pickle.dumps(Payload(folder)),
        },
        "legacy weights": {"data/weights/model.pt": saved},
    }


@pytest.mark.parametrize("kind", ["sample inputs", "flagged weight", "opaque constant", "legacy weights"])
def test_a_pickle_in_the_archive_is_refused_and_not_run(archive: Path, tmp_path: Path, kind: str) -> None:
    bad = rewrite(archive, tmp_path / "bad.pt2", pickles(tmp_path / "made")[kind])
    with pytest.raises(SpeedupError, match="refused to load this archive"):
        load_pt2(bad)
    assert not (tmp_path / "made").exists()


def test_an_old_style_archive_is_refused_and_not_run(archive: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(bad, "w") as new:
        new.writestr("version", "8.20")
        new.writestr("serialized_exported_program.json", "{}")
        for name in ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"):
            new.writestr(name, torch_save(Payload(tmp_path / "made")))
    with pytest.raises(SpeedupError, match=r"not a torch\.export archive"):
        load_pt2(bad)
    assert not (tmp_path / "made").exists()


def node(program: Any) -> Any:
    return program["graph_module"]["graph"]["nodes"][0]


def first_size(program: Any) -> Any:
    return program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: node(p).update(target="torch.os.system"), "operator 'torch.os.system'"),
        (lambda p: node(p).update(target="torch.ops.aten.from_file.default"), "operator 'torch.ops.aten.from_file"),
        (lambda p: node(p).update(target="_operator.methodcaller"), "operator '_operator.methodcaller'"),
        (lambda p: first_size(p).update(expr_str="__import__('os').mkdir('x')"), "expression"),
        (lambda p: first_size(p).update(expr_str="exit()"), "in an expression the name 'exit'"),
        (lambda p: p["range_constraints"].update({"s0.bit_length": {"min_val": 0, "max_val": 1}}), "expression"),
        (lambda p: node(p).update(name="x = exit()"), "text 'x = exit"),
        (lambda p: node(p)["metadata"].update(custom="{}"), "metadata 'custom'"),
        (
            lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(
                out_spec='[1, {"type": "collections.defaultdict", "context": {}, "children_spec": []}]'
            ),
            "type 'collections.defaultdict'",
        ),
    ],
)
def test_a_program_that_could_run_code_is_refused(
    archive: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    bad = rewrite(archive, tmp_path / "bad.pt2", {"models/model.json": change})
    with pytest.raises(SpeedupError, match=message):
        load_pt2(bad)


def test_native_code_and_further_models_are_refused(archive: Path, tmp_path: Path) -> None:
    for name in ("data/aotinductor/model/x.so", "models/other.json", "data/constants/custom_obj_0"):
        with pytest.raises(SpeedupError, match=f"the file '{name}'"):
            load_pt2(rewrite(archive, tmp_path / "bad.pt2", {name: b"{}"}))


def test_what_is_not_an_archive(tmp_path: Path) -> None:
    with pytest.raises(SpeedupError, match=r"cannot read .*No such file"):
        load_pt2(tmp_path / "missing.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(SpeedupError, match=r"not a torch\.export archive"):
        load_pt2(tmp_path / "text.pt2")


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(SpeedupError, match="DataDependent cannot be exported"):
        export_pt2(DataDependent(), torch.randn(2, 4), tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


def test_an_example_without_a_batch(tmp_path: Path) -> None:
    with pytest.raises(SpeedupError, match="no tensor with a batch dimension"):
        export_pt2(nn.Linear(4, 3), (), tmp_path / "model.pt2")


def test_a_module_that_runs_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = nn.Dropout(0.5)
    model, x = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 2), shared).eval(), torch.randn(3, 4)
    export_pt2(model, x, tmp_path / "model.pt2")
    torch.testing.assert_close(load_pt2(tmp_path / "model.pt2")(x), model(x))


class Blocks(nn.Module):
    """Blocks of other modes, a constant, a tied weight, infinities and sizes as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, mask: Tensor) -> dict[str, Any]:
        hidden = self.embed(ids)
        with torch.no_grad():
            shift = hidden.mean(1, keepdim=True) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        with torch.autocast("cpu", enabled=False):
            hidden = hidden - shift
        scores = (hidden @ hidden.transpose(1, 2)).masked_fill(mask[:, None] == 0, float("-inf")).softmax(-1)
        upper = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
        return {"scores": (scores + upper).softmax(-1), "logits": self.head(hidden)}


def test_blocks_constants_tied_weights_and_infinities(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks().eval()
    export_pt2(model, {"mask": torch.ones(2, 5), "ids": torch.randint(9, (2, 5))}, tmp_path / "model.pt2")
    loaded = load_pt2(tmp_path / "model.pt2")
    ids, mask = torch.randint(9, (3, 5)), torch.ones(3, 5)
    mask[1, 3:] = 0
    expected, found = model(ids, mask=mask), loaded(mask=mask, ids=ids)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in ("scores", "logits"))
    state = loaded.program.state_dict()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()


class ForeignOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.raycomp_test.double(x)
        return made


def test_an_operator_of_ones_own_is_named_when_the_model_is_exported(tmp_path: Path) -> None:
    with torch.library._scoped_library("raycomp_test", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        with pytest.raises(SpeedupError, match=r"operator 'torch\.ops\.raycomp_test\.double\.default'"):
            export_pt2(ForeignOperator(), torch.randn(2, 4), tmp_path / "model.pt2")


ONE, TWO = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)


class Many(nn.Module):
    """Takes any number of inputs, and adds them."""

    def forward(self, *given: Tensor) -> Tensor:
        return torch.stack(given).sum(0)


class Optional(nn.Module):
    """Names one of its inputs, and passes over what else it is given."""

    def forward(self, x: Tensor, *rest: Any, scale: float = 1.0, **other: Any) -> Tensor:
        return x * scale


@pytest.mark.parametrize("model, example", [(Many(), (ONE, TWO)), (Many(), (ONE,)), (Optional(), {"x": ONE})])
def test_a_model_of_any_number_of_inputs_loads_and_is_exported_again(model: Any, example: Any, tmp_path: Path) -> None:
    def run(module: nn.Module) -> Tensor:
        return module(**example) if isinstance(example, dict) else module(*example)

    first, second = tmp_path / "first.pt2", tmp_path / "second.pt2"
    export_pt2(model, example, first)
    export_pt2(load_pt2(first), example, second)
    assert torch.equal(run(load_pt2(first)), run(model)) and torch.equal(run(load_pt2(second)), run(model))


def test_a_program_of_two_hundred_layers_is_read() -> None:
    """Its lists and objects are more than a small document may hold, and in proportion to its length."""
    call = {
        "target": "torch.ops.aten.add.Tensor",
        "inputs": [{"name": "self", "arg": {"as_tensor": {"name": "p_layers_100_attention_weight"}}, "kind": 1}],
        "outputs": [{"as_tensor": {"name": "scaled_dot_product_attention_100"}}],
        "metadata": {},
    }
    graph = {"inputs": [], "outputs": [], "nodes": [call] * 60_000, "tensor_values": {}}
    graph |= {"sym_int_values": {}, "sym_bool_values": {}}
    module = {"graph": graph, "signature": {"input_specs": [], "output_specs": []}, "module_call_graph": []}
    program = {"graph_module": module, "opset_version": {}, "range_constraints": {}, "schema_version": {}}
    text = json.dumps(program)
    assert text.count("{") + text.count("[") > 2**18
    found = parse_document(PROGRAM, text, "a program", "model.json")
    assert len(found.graph_module.graph.nodes) == 60_000
    assert found.graph_module.graph.nodes[-1].outputs[0].kind == "as_tensor"
