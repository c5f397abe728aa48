"""A cut Hugging Face model keeps its class and its arguments, and is saved so that it loads again, or says how else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from raycomp.errors import SpeedupError
from raycomp.speedup import ModelSpeedup, Plan, apply_plan
from tests.speedup.cutting import row_masks

LAYER = "bert.encoder.layer.{}.{}"
IDS = {"input_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), "attention_mask": torch.ones(2, 5)}


def bert(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    # All sizes are 16 somewhere: the config's right one has to be found.
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=16,
        max_position_embeddings=16, num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def cut(model: nn.Module, gone: dict[str, Any], example: Any) -> tuple[Any, Plan]:
    speedup = ModelSpeedup(model, example, row_masks(model, gone))
    small = speedup.speedup_model()
    assert small is not model
    return small, speedup.plan


def test_the_config_says_the_size_that_all_layers_have(tmp_path: Path) -> None:
    model = bert()
    gone = {LAYER.format(0, "intermediate.dense"): range(4), LAYER.format(1, "intermediate.dense"): range(5, 9)}
    small, plan = cut(model, gone, IDS)
    again = apply_plan(bert(), plan).eval()
    again.load_state_dict(small.state_dict())
    for each in (small, again):
        assert (each.config.intermediate_size, each.config.hidden_size, each.config.vocab_size) == (12, 16, 16)
        assert each.bert.config is each.config
        each.save_pretrained(tmp_path)
        loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(**IDS).logits, small(**IDS).logits)
    assert model.config.intermediate_size == 16


def test_sizes_in_a_list_of_the_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model, x = transformers.ResNetForImageClassification(config).eval(), torch.randn(2, 1, 16, 16)
    last = "resnet.encoder.stages.1.layers.0"
    names = [f"{last}.shortcut.convolution", f"{last}.layer.1.convolution"]
    norms = [f"{last}.shortcut.normalization", f"{last}.layer.1.normalization", f"{last}.layer.0.normalization"]
    gone = {name: range(6) for name in (*names, *norms, f"{last}.layer.0.convolution")}
    small, _ = cut(model, gone, {"pixel_values": x})
    assert small.config.hidden_sizes == [8, 10]
    small.save_pretrained(tmp_path)
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(x).logits, small(x).logits)


def test_sizes_that_no_config_can_say_are_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    small, _ = cut(bert(), {LAYER.format(0, "intermediate.dense"): range(4)}, IDS)
    with pytest.raises(SpeedupError, match=r"save its state_dict, or .*raycomp\.load\(uri, model\)"):
        copy.deepcopy(small).save_pretrained(tmp_path)
    assert small.config.intermediate_size == 16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_class_stays_and_labels_are_taken_where_attention_is_pruned_unevenly(attention: str) -> None:
    model = bert(attention)
    gone = {LAYER.format(1, "attention.self.value"): [0, 1, 7], LAYER.format(0, "intermediate.dense"): range(4)}
    small, _ = cut(model, gone, IDS)
    assert type(small) is transformers.BertForSequenceClassification
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 12
    labels = torch.tensor([0, 2])
    expected = nn.functional.cross_entropy(small(**IDS).logits, labels)
    torch.testing.assert_close(small(**IDS, labels=labels).loss, expected)


class Flat(nn.Module):
    """States its size, and takes a scale that the example doesn't give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(32, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.fc(self.conv(x).reshape(-1, 32)) * scale


def test_a_forward_is_replaced_where_much_depends_on_it() -> None:
    torch.manual_seed(0)
    small, plan = cut(Flat().eval(), {"conv": range(4)}, torch.randn(2, 1, 4, 4))
    assert small.fc.in_features == 16 and plan.surgeries[0].graph is not None
