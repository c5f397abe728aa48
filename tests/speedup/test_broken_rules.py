"""A rule that raises costs its own operator, and the reason says so; what else is masked is cut all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from raycomp.speedup import RULES, ModelSpeedup, Rule, auto_set_dependency_group_ids
from tests.speedup.cutting import randomize_, row_masks

METHODS = ("relate", "influence", "sinks", "makes", "channels", "attributes", "resize")


class TwoBranches(nn.Module):
    """One through a ReLU, one through a tanh; the view states sizes, so that every method of a rule is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.relu(self.a(x))) + self.d(torch.tanh(self.c(x)))


def raising(operator: str, method: str) -> Rule:
    """The operator's own rule, but for one method."""

    def fail(*_: Any) -> Any:
        raise ValueError("from the rule")

    own = type(RULES._rules[operator])
    made: Rule = type("Raising", (own,), {method: fail})()
    return made


@pytest.mark.parametrize("method", ["relate", "influence", "sinks", "makes", "channels", "attributes"])
def test_its_operator_is_left_whole_and_named(method: str) -> None:
    torch.manual_seed(0)
    model = randomize_(TwoBranches())
    x, masks = torch.randn(3, 4).double(), row_masks(model, {"a": [0, 1, 2], "c": [0, 1]})
    speedup = ModelSpeedup(model, x, masks, customized_rules={"aten.relu": raising("aten.relu", method)})
    small = speedup.speedup_model()
    assert small.a.out_features == 6 and small.c.out_features == 4
    reasons = {item.module: item.reason for item in speedup.unpruned}
    assert reasons == {"a": "the speedup rule for aten.relu raised ValueError: from the rule"}
    torch.testing.assert_close(small(x), speedup.simulated(x))


class Wrong(Rule):
    def influence(self, *_: Any) -> list[Tensor]:
        return [torch.zeros(5)]


def test_a_rule_that_answers_in_a_wrong_shape_is_one_that_raises() -> None:
    torch.manual_seed(0)
    model = randomize_(TwoBranches())
    x, masks = torch.randn(3, 4).double(), row_masks(model, {"a": [0], "c": [0]})
    speedup = ModelSpeedup(model, x, masks, customized_rules={"aten.tanh": Wrong()})
    assert speedup.speedup_model().c.out_features == 6
    assert ["influence gives the shapes [(5,)]" in item.reason for item in speedup.unpruned] == [True]


def test_groups_are_found_without_the_rule_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    config_list = [{"op_names": ["a", "c"], "sparse_ratio": 0.5}]
    model, x = TwoBranches(), torch.randn(3, 4)
    monkeypatch.setitem(RULES._rules, "aten.relu", raising("aten.relu", "relate"))
    found = auto_set_dependency_group_ids(model, config_list, x)
    assert [entry["op_names"] for entry in found]
