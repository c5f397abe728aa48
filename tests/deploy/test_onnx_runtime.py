from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from raycomp.deploy.int8 import lower_int8
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.onnx_runtime import execution, load_onnx
from raycomp.errors import SpeedupError
from tests.deploy.networks import calibrate


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: its keys are attributes, and values that are None are left out."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Classifier(nn.Module):
    """Called by keyword, it ignores labels but for a loss, like Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> ModelOutput:
        hidden = ids.float() if mask is None else ids * mask
        logits = self.fc(hidden)
        output = ModelOutput(logits=logits, pairs=(Pair(hidden, logits + 1), [logits * 2]))
        if labels is not None:
            output["loss"] = nn.functional.cross_entropy(logits, labels)
        return output


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    torch.manual_seed(0)
    model, path = Classifier(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    signature = export_onnx(model, {"ids": torch.randint(9, (2, 4)), "mask": torch.rand(2, 4)}, path)
    assert signature.dynamic_batch
    return model.eval(), path


def test_the_answer_has_the_structure_of_the_float_models(exported: tuple[Classifier, Path]) -> None:
    model, path = exported
    ids, mask = torch.randint(9, (5, 4)), torch.rand(5, 4)
    with torch.no_grad():
        expected = model(ids, mask)
    for real in (load_onnx(path)(ids, mask), load_onnx(path, threads=1).eval()(mask=mask, ids=ids)):
        assert list(real) == ["logits", "pairs"]
        assert torch.allclose(real.logits, expected.logits, atol=1e-6)
        assert torch.equal(real["logits"], real.logits)
        assert torch.allclose(real.pairs[0].second, expected.pairs[0].second, atol=1e-6)
        assert type(real.pairs) is tuple and type(real.pairs[1]) is list
    with pytest.raises(AttributeError, match="no output 'loss', only logits, pairs"):
        real.loss  # noqa: B018


def test_labels_are_left_out_and_other_keywords_are_not(exported: tuple[Classifier, Path]) -> None:
    module = load_onnx(exported[1])
    ids, mask = torch.randint(9, (5, 4)), torch.rand(5, 4)
    assert "loss" not in module(ids, mask=mask, labels=torch.zeros(5))
    for args, kwargs, message in (
        ((ids,), {}, "takes ids, mask, and needs mask"),
        ((ids, mask), {"colour": ids}, "takes ids, mask, and got colour; what else its class takes"),
        ((ids, mask), {"mask": mask}, "several values for argument 'mask'"),
        ((ids, 3), {}, "expected a tensor, got int"),
    ):
        with pytest.raises(TypeError, match=message):
            module(*args, **kwargs)


def test_inputs_are_cast_to_what_the_model_takes(exported: tuple[Classifier, Path]) -> None:
    model, path = exported
    ids, mask = torch.randint(9, (5, 4)), torch.rand(5, 4)
    real = load_onnx(path)(ids.int(), mask.double())
    assert real.logits.dtype == torch.float32
    assert torch.allclose(real.logits, model(ids, mask).logits, atol=1e-5)


def test_a_wrong_shape_names_the_right_one(exported: tuple[Classifier, Path]) -> None:
    with pytest.raises(SpeedupError, match=r"the model takes ids \['\w+', 4\], mask"):
        load_onnx(exported[1])(torch.randint(9, (5, 3)), torch.rand(5, 3))


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 2, 4).sum(1)


def test_a_fixed_batch_is_reported(tmp_path: Path) -> None:
    assert not export_onnx(Fixed(), torch.randn(3, 8), tmp_path / "model.onnx").dynamic_batch
    module = load_onnx(tmp_path / "model.onnx")
    assert not module.dynamic_batch
    assert module(torch.randn(3, 8)).shape == (3, 4)
    with pytest.raises(SpeedupError, match="ONNX Runtime cannot run this input"):
        module(torch.randn(6, 8))


def test_files_are_as_the_model_names_things_and_tell_their_versions(exported: tuple[Classifier, Path]) -> None:
    file = onnx.load(exported[1])
    onnx.checker.check_model(file, full_check=True)
    assert [value.name for value in file.graph.input] == ["ids", "mask"]
    outputs = [value.name for value in file.graph.output]
    assert outputs == ["output.logits", "output.pairs.0.0", "output.pairs.0.1", "output.pairs.1.0"]
    assert {"fc.weight", "fc.bias"} <= {tensor.name for tensor in file.graph.initializer}
    told = load_onnx(exported[1]).metadata["versions"]["torch"]
    assert Version(told).release == Version(torch.__version__).release
    assert b".py" not in exported[1].read_bytes()


def test_int8_files_load_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6)
    lowered = lower_int8(model, calibrate(model, x, ["0"]), [], x, reduce_range=True)
    lowered.save(tmp_path / "int8.onnx")
    file = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert [value.name for value in file.graph.output] == ["output"]
    loaded = load_onnx(tmp_path / "int8.onnx", cuda=True)
    assert loaded.metadata["reduce_range"] is True
    assert loaded.providers[-1] == "CPUExecutionProvider"
    assert torch.equal(loaded(x), lowered.as_module()(x))


def test_execution_tells_integer_from_float_layers(tmp_path: Path) -> None:
    export_onnx(nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6), tmp_path / "model.onnx")
    ran = execution((tmp_path / "model.onnx").read_bytes())
    assert ran.operators == {"Gemm": 1} and ran.dequantized == ()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpeedupError, match=r"cannot read .*No such file"):
        load_onnx(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(SpeedupError, match="ONNX Runtime cannot load the model"):
        load_onnx(tmp_path / "text.onnx")
    export_onnx(nn.Linear(6, 4), torch.randn(2, 6), tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    del file.metadata_props[:]
    onnx.save(file, tmp_path / "foreign.onnx")
    with pytest.raises(SpeedupError, match="not exported by raycomp"):
        load_onnx(tmp_path / "foreign.onnx")


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x @ x.mT).real


class Strange(nn.Module):
    def forward(self, x: Tensor) -> object:
        return {"x": x, "extra": object()}


def test_what_onnx_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(SpeedupError, match="Unsupported cannot be exported to ONNX"):
        export_onnx(Unsupported(), torch.randn(2, 3, 3), tmp_path / "model.onnx")
    with pytest.raises(SpeedupError, match="takes or returns a object"):
        export_onnx(Strange(), torch.randn(2, 3), tmp_path / "model.onnx")
