"""What differs between real inputs stays open in every exported form; where it can't, the sizes are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from raycomp.deploy.int8 import lower_int8, simulate_int8
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.onnx_runtime import load_onnx
from raycomp.deploy.pt2 import export_pt2, load_pt2
from tests.deploy.networks import calibrate


@dataclass
class Scores:
    """A class of the user's own, which torch.export doesn't know."""

    logits: Tensor
    weights: tuple[Tensor, ...]
    loss: Tensor | None = None


class Text(nn.Module):
    """Attention over the tokens that the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.fc = nn.Embedding(9, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Scores:
        hidden = self.embed(ids)
        weights = self.query(hidden).squeeze(-1).masked_fill(mask == 0, -100.0).softmax(-1)
        return Scores(self.fc((hidden * weights[..., None]).sum(1)), (weights,))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu()).mean((2, 3))


class Recurrent(nn.Module):
    """Runs both ways over several layers; the last states count, too."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(10, 3)
        self.layer = layer(4, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        output, state = self.layer(self.embed(ids) * mask[..., None])
        hidden = state[0] if isinstance(state, tuple) else state
        return self.fc(output.mean(1) + hidden[-2:].transpose(0, 1).flatten(1))


def text(length: int, size: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(length)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"ids": torch.randint(9, (size, length)), "mask": mask}


def images(height: int, width: int, size: int = 2) -> Tensor:
    return torch.randn(size, 3, height, width, generator=torch.Generator().manual_seed(height))


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], list[Any], list[str]]] = {
    # The length of 2 is also the batch's size.
    "texts": (Text, [text(5), text(2), text(9)], [text(3), text(12, 4), text(9, 1)], ["fc"]),
    "lstm": (lambda: Recurrent(nn.LSTM), [text(5), text(2)], [text(3), text(12, 4), text(9, 1)], ["fc"]),
    "gru": (lambda: Recurrent(nn.GRU), [text(5), text(2)], [text(3), text(12, 4), text(9, 1)], ["fc"]),
    "images": (Images, [images(8, 8), images(12, 9)], [images(10, 7), images(6, 14, 3)], ["conv", "head"]),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Any], list[Any], list[str]]:
    torch.manual_seed(0)
    make, given, further, layers = CASES[request.param]
    return make().eval(), given, further, layers


def called(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def test_every_form_takes_sizes_that_it_was_not_exported_with(case: Any, tmp_path: Path) -> None:
    model, (example, *others), further, layers = case
    assert export_pt2(model, example, tmp_path / "model.pt2", others).fixed == ()
    assert export_onnx(model, example, tmp_path / "model.onnx", others).fixed == ()
    for loaded in (load_pt2(tmp_path / "model.pt2"), load_onnx(tmp_path / "model.onnx")):
        for inputs in further:
            torch.testing.assert_close(logits(called(loaded, inputs)), logits(called(model, inputs)))
    calibration = calibrate(model, example, dict.fromkeys(layers, ("weight", "_input_0", "_output_0")))
    int8 = lower_int8(model, calibration, [], example, others=others)
    assert int8.fixed == ()
    simulated = simulate_int8(model, calibration, reduce_range=int8.reduce_range)
    for inputs in further:
        expected, found = logits(called(simulated, inputs)), logits(called(int8.as_module(), inputs))
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_without_others_the_sizes_of_the_example_are_the_only_ones(tmp_path: Path) -> None:
    assert export_pt2(Images(), images(8, 8), tmp_path / "model.pt2").fixed == ()
    with pytest.raises(RuntimeError):
        load_pt2(tmp_path / "model.pt2")(images(10, 7))


def test_recurrent_layers_that_onnx_lacks_are_exported_for_one_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = Recurrent(nn.RNN).eval(), [text(5), text(2)]
    fixed = ("ids of size 5 in dimension 1", "mask of size 5 in dimension 1")
    assert export_pt2(model, given[0], tmp_path / "model.pt2", given[1:]).fixed == fixed
    assert export_onnx(model, given[0], tmp_path / "model.onnx", given[1:]).fixed == fixed
    for loaded in (load_pt2(tmp_path / "model.pt2"), load_onnx(tmp_path / "model.onnx")):
        torch.testing.assert_close(called(loaded, text(5, 3)), called(model, text(5, 3)))


class Flat(nn.Module):
    """States the number of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.fc(x[:, :6]) * scale if x.shape[1] == 8 else self.fc(x[:, :6])


def test_a_size_that_the_code_branches_on_is_named_with_its_input(tmp_path: Path) -> None:
    example, other = (
        {"scale": torch.ones(2, 2), "x": torch.randn(2, 8)},
        {"scale": torch.ones(2, 2), "x": torch.randn(2, 6)},
    )
    fixed = ("x of size 8 in dimension 1",)
    assert export_pt2(Flat(), example, tmp_path / "model.pt2", [other]).fixed == fixed
    assert export_onnx(Flat(), example, tmp_path / "model.onnx", [other]).fixed == fixed
    assert load_pt2(tmp_path / "model.pt2")(scale=torch.ones(5, 2), x=torch.randn(5, 8)).shape == (5, 2)


def test_what_the_model_returns_in_a_class_of_its_own_loads_without_that_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Text().eval(), text(5)
    export_pt2(model, inputs, tmp_path / "model.pt2")
    export_onnx(model, inputs, tmp_path / "model.onnx")
    expected = called(model, inputs)
    for loaded in (load_pt2(tmp_path / "model.pt2"), load_onnx(tmp_path / "model.onnx")):
        output = called(loaded, inputs)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output["weights"][0], expected.weights[0])
        assert output.loss is None and output[0] is output.logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformer_loads_for_texts_of_any_length(attention: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()

    def tokens(length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(2 * length).view(2, -1) % 16, "attention_mask": text(length)["mask"]}

    assert export_pt2(model, tokens(5), tmp_path / "model.pt2", [tokens(9)]).fixed == ()
    loaded = load_pt2(tmp_path / "model.pt2")
    for length in (3, 12):
        torch.testing.assert_close(loaded(**tokens(length)).logits, called(model, tokens(length)).logits)
