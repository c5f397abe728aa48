from __future__ import annotations

import torch

from raycomp.core.parts import as_call
from raycomp.speedup.graph.example import Outputs, bind, with_batch_size


def test_an_example_is_a_call() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert as_call(x) == ((x,), {})
    assert as_call((x, y)) == ((x, y), {})
    assert as_call({"x": x}) == ((), {"x": x})
    assert bind(("a",), (x, y), {"b": x}) == {"a": x, "1": y, "b": x}


def test_resizing_repeats_samples_and_leaves_what_has_no_batch() -> None:
    x, shared, scalar = torch.arange(6).view(3, 2), torch.arange(4), torch.tensor(1.0)
    resized = with_batch_size({"x": x, "parts": [x, shared], "scalar": scalar}, 4)
    assert isinstance(resized, dict)
    assert resized["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert resized["parts"][0].shape == (4, 2)
    assert resized["parts"][1] is shared and resized["scalar"] is scalar
    smaller = with_batch_size((x,), 1)
    assert isinstance(smaller, tuple) and smaller[0].tolist() == [[0, 1]]


def test_outputs_are_found_by_key_attribute_and_position() -> None:
    outputs = Outputs(logits=1, hidden=2)
    assert (outputs["hidden"], outputs.hidden, outputs[1], outputs[-2:]) == (2, 2, 2, (1, 2))
    assert list(outputs) == ["logits", "hidden"] and list(outputs.values()) == [1, 2]
