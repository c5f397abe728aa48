"""One argument or part replaced: found by index and by name, the user's classes kept."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch

from raycomp.core.parts import as_call, replace_input, replace_output

Pair = namedtuple("Pair", ["first", "second"])


class Fields(OrderedDict):
    def __init__(self, *, loss: int, logits: int) -> None:
        super().__init__(loss=loss, logits=logits)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("0", ((-1,), {"b": 2, "more": 3})),
        ("a", ((-1,), {"b": 2, "more": 3})),
        ("1", ((1,), {"b": -2, "more": 3})),
        ("b", ((1,), {"b": -2, "more": 3})),
        ("more", ((1,), {"b": 2, "more": -3})),
        ("2", ((1,), {"b": 2, "more": 3})),
        ("absent", ((1,), {"b": 2, "more": 3})),
    ],
)
def test_an_argument_is_met_by_index_and_by_name(key: str, expected: Any) -> None:
    given = {"b": 2, "more": 3}
    assert replace_input((1,), given, key, ["a", "b"], lambda value: -value) == expected
    assert given == {"b": 2, "more": 3}


@pytest.mark.parametrize(
    ("output", "key", "expected"),
    [
        (5, "0", -5),
        (5, "1", 5),
        ((1, 2), "1", (1, -2)),
        ((1, 2), "2", (1, 2)),
        ([1, 2], "0", [-1, 2]),
        (Pair(1, 2), "second", Pair(1, -2)),
        (Pair(1, 2), "0", Pair(-1, 2)),
        ({"loss": 1, "logits": 2}, "logits", {"loss": 1, "logits": -2}),
        ({"loss": 1, "logits": 2}, "1", {"loss": 1, "logits": -2}),
        ({"loss": 1}, "logits", {"loss": 1}),
        ({"loss": 1}, "1", {"loss": 1}),
        ({"loss": 1}, "2", {"loss": 1}),
        ((1, 2), "third", (1, 2)),
        (OrderedDict(loss=1, logits=2), "0", OrderedDict(loss=-1, logits=2)),
    ],
)
def test_a_part_of_an_output_is_replaced_in_its_own_class(output: Any, key: str, expected: Any) -> None:
    before = str(output)
    changed = replace_output(output, key, lambda value: -value)
    assert changed == expected and type(changed) is type(expected)
    assert str(output) == before


def test_a_mapping_that_cannot_be_copied_keeps_its_class() -> None:
    changed = replace_output(Fields(loss=1, logits=2), "loss", lambda value: -value)
    assert type(changed) is Fields and dict(changed) == {"loss": -1, "logits": 2}


def test_an_example_stands_for_a_call() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    assert as_call(one) == ((one,), {})
    assert as_call((one, two)) == as_call([one, two]) == ((one, two), {})
    assert as_call({"left": one}) == ((), {"left": one})
