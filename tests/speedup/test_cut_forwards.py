"""Ways to write a forward: each is cut, or left whole with its reason, and always gives the right outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from raycomp.speedup import ModelSpeedup
from tests.speedup.cutting import row_masks, shapes, speed_up


def gated_by_constant(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    with torch.no_grad():
        gate = hidden.sigmoid()
    return net.b(hidden * gate)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    return net.b(checkpoint(lambda each: net.a(each).relu(), x, use_reentrant=False))


def in_place_on_a_view(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    hidden.view(-1).relu_()
    return net.b(hidden)


def in_place_twice(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    before = hidden.sum(0, keepdim=True)
    hidden.mul_(2).add_(before)
    return net.b(hidden.relu_() + hidden)


def made_tensors(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    return net.b(hidden * hidden.new_ones(hidden.shape) + torch.zeros_like(hidden) + torch.zeros(8).double())


def glu(net: Any, x: Tensor) -> Tensor:
    return net.b(functional.glu(torch.cat([net.a(x), net.a(x)], 1), 1))


def normalised(net: Any, x: Tensor) -> Tensor:
    return net.b(functional.normalize(net.a(x), dim=1))


def by_matmul(net: Any, x: Tensor) -> Tensor:
    return net.a(x) @ net.b.weight.T + net.b.bias


def functionally(net: Any, x: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, net.a.weight, net.a.bias).relu(), weight=net.b.weight)


def stacked(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.stack([net.a(x), net.a(x).relu()]).sum(0))


def repeated(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x).repeat(1, 2)[:, :8])


def where(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    return net.b(torch.where(hidden > 0, hidden, hidden.abs().clamp(max=2.0)))


CUT = (
    gated_by_constant, checkpointed, in_place_on_a_view, in_place_twice, made_tensors, glu, normalised, by_matmul,
    functionally, stacked, repeated, where,
)  # fmt: skip


@pytest.mark.parametrize("forward", CUT)
def test_forwards_that_are_cut(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, speedup = speed_up(network(forward), torch.randn(2, 5).double(), lambda m: row_masks(m, {"a": [1, 2, 5]}))
    assert shapes(model, "a", "b") == [(5, 5), (3, 5)]
    assert speedup.unpruned == ()


def in_autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        hidden = net.a(x)
    return net.b(hidden.relu())


def by_einsum(net: Any, x: Tensor) -> Tensor:
    return torch.einsum("bi,oi->bo", net.a(x), net.b.weight)


def by_index(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x)[:, torch.arange(7, -1, -1)])


def by_step(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x)[:, ::2].repeat(1, 2))


def sorted_(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x).sort(1)[0])


def softmax(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x).softmax(-1))


def averaged(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x) - net.a(x).mean(-1, keepdim=True))


@pytest.mark.parametrize("forward", [in_autocast, by_einsum, by_index, by_step, sorted_, softmax, averaged])
def test_forwards_that_are_left_and_named(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, speedup = speed_up(network(forward), torch.randn(2, 5).double(), lambda m: row_masks(m, {"a": [1, 2, 5]}))
    assert shapes(model, "a", "b") == [(8, 5), (3, 8)]
    assert [(u.module, u.dim, u.count) for u in speedup.unpruned] == [("a", 0, 3)]
    assert "aten." in speedup.unpruned[0].reason or "autocast" in speedup.unpruned[0].reason


def network(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Net


@pytest.mark.parametrize("form", ["positional", "keyword", "none"])
def test_constants_among_the_arguments(form: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, flag: bool = False, extra: Tensor | None = None) -> Tensor:
            return self.b(self.a(x).relu() if flag else self.a(x))

    x = torch.randn(2, 5).double()
    examples: dict[str, Any] = {
        "positional": (x, True),
        "keyword": {"x": x, "flag": True},
        "none": (x, False, None),
    }
    model, _ = speed_up(Net, examples[form], lambda m: row_masks(m, {"a": [1, 2, 5]}))
    assert shapes(model, "a", "b") == [(5, 5), (3, 5)]


def test_unused_layers_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, speedup = speed_up(
        Net, torch.randn(2, 5).double(), lambda m: row_masks(m, {"a": [1], "spare": [0, 1]}, biases=False)
    )
    assert shapes(model, "a", "spare") == [(7, 5), (8, 8)]
    assert [(u.module, u.count, u.reason) for u in speedup.unpruned] == [("spare", 2, "forward() does not use it")]


def test_a_chain_of_dead_layers_goes() -> None:
    """Nothing needs the branch whose result is multiplied with masked weights."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.out = (
                nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 6), (6, 2))
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.c(self.b(self.a(x).relu()).relu()).relu())

    def masks(model: Any) -> dict[str, dict[str, Tensor]]:
        columns = torch.ones_like(model.c.weight)
        columns[:, :5] = 0
        return {"c": {"weight": columns}}

    model, _ = speed_up(Net, torch.randn(2, 3, 6, 6).double(), masks)
    assert shapes(model, "a", "b", "c") == [(8, 3, 3, 3), (3, 8, 3, 3), (6, 3, 3, 3)]


def test_a_sum_does_not_miss_zeros() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(x.new_ones(1, 8) * net.a(x).sum(-1, keepdim=True))

    model, _ = speed_up(network(forward), torch.randn(2, 5).double(), lambda m: row_masks(m, {"a": [1, 2, 5]}))
    assert shapes(model, "a", "b") == [(5, 5), (3, 8)]


def test_dropout_that_is_active_in_eval_mode_makes_no_constants() -> None:
    """Monte Carlo dropout: a channel that the norm makes 0.5 is 0 or 1 behind it; one that is zero stays zero."""

    class Net(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.a, self.bn, self.b, self.p = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), p

        def forward(self, x: Tensor) -> Tensor:
            return self.b(functional.dropout(self.bn(self.a(x)), self.p))

    example = torch.randn(2, 5).double()
    model, _ = speed_up(lambda: Net(0.0), example, lambda m: row_masks(m, {"a": [1, 2, 5]}))
    assert shapes(model, "a", "b") == [(8, 5), (3, 8)]
    model, _ = speed_up(lambda: Net(0.0), example, lambda m: row_masks(m, {"a": [1, 2, 5], "bn": [1, 2, 5]}))
    assert shapes(model, "a", "b") == [(5, 5), (3, 5)]


def test_a_model_that_gives_other_outputs_every_time_is_left_whole() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(functional.dropout(self.a(x), 0.5))

    model = Noisy()
    speedup = ModelSpeedup(model, torch.randn(2, 5), row_masks(model, {"a": [1, 2, 5]}))
    small: Any = speedup.speedup_model()
    assert shapes(small, "a", "b") == [(8, 5), (3, 8)]
    assert not small.a.weight[[1, 2, 5]].any()
    assert speedup.plan.surgeries == ()
    assert [(u.module, u.count) for u in speedup.unpruned] == [("a", 3)]
    assert "outputs differed" in speedup.unpruned[0].reason


def test_zeros_in_the_shape_of_the_input() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        hidden = net.a(x)
        return net.b(hidden + torch.cat([hidden[:, :4], hidden.new_zeros(x.size(0), 4)], 1))

    model, speedup = speed_up(network(forward), torch.randn(2, 5).double(), lambda m: row_masks(m, {"a": [1, 6]}))
    assert shapes(model, "a", "b") == [(6, 5), (3, 6)]
    assert speedup.plan.surgeries[0].graph is not None


def test_keyword_arguments_in_another_order() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, left: Tensor, right: Tensor, *, scale: Tensor) -> Tensor:
            return self.c((self.a(left) + self.b(right)).view(-1, 8) * scale)

    example = {
        "scale": torch.randn(2, 1).double(),
        "right": torch.randn(2, 4).double(),
        "left": torch.randn(2, 5).double(),
    }
    model, speedup = speed_up(Net, example, lambda m: row_masks(m, {"a": [1, 6], "b": [1, 6]}))
    assert shapes(model, "a", "b", "c") == [(6, 5), (6, 4), (3, 6)]
    assert speedup.plan.surgeries[0].graph is not None
