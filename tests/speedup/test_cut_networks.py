"""Whole networks: branches, concatenation, splits, views, attention to channels, shared modules, several stages."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from raycomp.speedup import ModelSpeedup, Plan, Rule, apply_plan, verify
from raycomp.speedup.rules.elementwise import Elementwise
from tests.speedup.cutting import (
    Custom,
    Masks,
    Residual,
    random_rows,
    randomize_,
    row_masks,
    shapes,
    simulate,
    speed_up,
)

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()


def rows(gone: dict[str, Iterable[int]], biases: bool = True) -> Any:
    return lambda model: row_masks(model, gone, biases=biases)


def test_norm_bias_that_a_padded_convolution_cannot_absorb_stays() -> None:
    """NNI's fault of 0.39: the channel goes although its norm's bias isn't zero."""
    model, speedup = speed_up(Residual, IMAGES, rows({"b1.conv1": [0, 3], "b2.conv1": [1, 2, 7]}))
    assert shapes(model, "b1.conv1", "b2.conv1") == [(8, 8, 3, 3), (8, 8, 3, 3)]
    assert {(u.module, u.count) for u in speedup.unpruned} == {("b1.conv1", 2), ("b2.conv1", 3)}
    assert "'b1.conv2'" in speedup.unpruned[0].reason
    assert "padding" in speedup.unpruned[0].reason


def test_aligned_norms_let_channels_go() -> None:
    model, speedup = speed_up(
        Residual, IMAGES, rows({"b1.conv1": [0, 3], "b1.bn1": [0, 3], "b2.conv1": [1, 2, 7], "b2.bn1": [1, 2, 7]})
    )
    assert shapes(model, "b1.conv1", "b1.conv2", "b2.conv1") == [(6, 8, 3, 3), (8, 6, 3, 3), (5, 8, 3, 3)]
    assert speedup.unpruned == ()


def test_branches_that_disagree_keep_the_union() -> None:
    """NNI's fault of 0.35: independent masks in the branches of an addition."""
    gone = {"stem": [0, 1, 2, 3], "b1.conv2": [1, 2, 3, 4], "b2.conv2": [2, 3, 4, 5]}
    norms = {"bn": gone["stem"], "b1.bn2": gone["b1.conv2"], "b2.bn2": gone["b2.conv2"]}
    model, speedup = speed_up(Residual, IMAGES, rows({**gone, **norms}))
    # Only 2 and 3 are masked in all three.
    assert shapes(model, "stem", "b1.conv1", "b1.conv2", "b2.conv2", "fc")[-1] == (5, 6)
    assert model.stem.out_channels == 6
    named = {(u.module, u.reason): u.count for u in speedup.unpruned}
    assert named["stem", "it is shared with 'b1.conv2', 'b2.conv2', not masked there"] == 1
    assert sum(u.count for u in speedup.unpruned if u.module == "b2.conv2") == 2


def test_last_block_takes_constants_up_into_the_classifier() -> None:
    """The mean of a constant over positions is a constant, which the linear layer's bias takes up."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(functional.relu(self.bn(self.conv(x))).mean((2, 3)))

    model, speedup = speed_up(Net, IMAGES, rows({"conv": [0, 5, 6]}))
    assert shapes(model, "conv", "fc") == [(5, 3, 3, 3), (5, 5)]
    assert speedup.unpruned == ()


def test_products_and_differences_of_branches() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
            self.out = nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x) * self.b(x) - self.c(x))

    # A product is zero where one factor is: the other factor's channel goes, too.
    model, _ = speed_up(Net, IMAGES, rows({"a": [0, 1], "b": [2], "c": [0, 1, 2, 3]}))
    assert shapes(model, "a", "b", "c", "out") == [(5, 3, 3, 3)] * 3 + [(4, 5, 3, 3)]


def test_concatenation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(13)
            self.c = nn.Conv2d(13, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x), self.b(x)
            return self.c(self.bn(torch.cat([right, left, x[:, :, 1:-1, 1:-1]], dim=1)))

    model, _ = speed_up(Net, IMAGES, rows({"a": [0, 5], "b": [1]}))
    assert shapes(model, "a", "b", "bn", "c") == [(4, 3, 3, 3), (3, 3, 3, 3), (10,), (5, 10, 1, 1)]
    assert not isinstance(model, fx.GraphModule)


def test_dense_block_uses_a_value_several_times() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3, padding=1)
            self.b, self.c = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            return self.c(torch.cat([x, self.b(x).relu()], 1))

    model, _ = speed_up(Net, IMAGES, rows({"a": [0, 5], "b": [1]}))
    assert shapes(model, "a", "b", "c") == [(4, 3, 3, 3), (3, 4, 3, 3), (5, 7, 3, 3)]


@pytest.mark.parametrize("how", ["chunk", "split", "sizes", "slice", "narrow", "unbind"])
def test_parts_of_channels(how: str) -> None:
    """Unequal parts: chunk and split state sizes, so the forward is rewritten; layers and names stay."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.a, self.b = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            if how == "chunk":
                left, right = x.chunk(2, 1)
            elif how == "split":
                left, right = x.split(4, dim=1)
            elif how == "sizes":
                left, right = x.split([4, 4], dim=1)
            elif how == "slice":
                left, right = x[:, :4], x[:, 4:]
            elif how == "narrow":
                left, right = x.narrow(1, 0, 4), x.narrow(1, 4, 4)
            else:
                left, right = x.unflatten(1, (2, 4)).unbind(1)
            return self.a(left) + self.b(right)

    # As (2, 4), the same channels of both halves must go; the other forms keep 2 and 3.
    model, speedup = speed_up(Net, IMAGES, rows({"conv": [0, 1, 4]}))
    expected = [(6, 3), (3, 3), (3, 3)] if how == "unbind" else [(5, 3), (3, 2), (3, 3)]
    assert [shape[:2] for shape in shapes(model, "conv", "a", "b")] == expected
    assert isinstance(model.conv, nn.Conv2d)
    assert isinstance(model, fx.GraphModule) == (how != "unflatten")
    assert sum(u.count for u in speedup.unpruned) == (1 if how == "unbind" else 0)


class Head(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.fc, self.unflatten = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6 * 6, 5), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        if self.how == "view":
            x = x.view(-1, 8 * 6 * 6)
        elif self.how == "size":
            x = x.view(x.size(0), -1)
        elif self.how == "shape":
            n, c, h, w = x.shape
            x = x.reshape(n, c * h * w)
        elif self.how == "flatten":
            x = torch.flatten(x, 1)
        elif self.how == "twice":
            x = x.reshape(-1, 8, 36).permute(0, 2, 1).transpose(1, 2).reshape(-1, 8 * 36)
        else:
            x = self.unflatten(x)
        return self.fc(x)


@pytest.mark.parametrize("how", ["view", "size", "shape", "flatten", "module", "twice"])
def test_heads(how: str) -> None:
    """NNI crashes on a view with a constant C·H·W."""
    model, speedup = speed_up(lambda: Head(how), IMAGES, rows({"conv": [0, 4, 5]}, biases=False))
    assert shapes(model, "conv", "fc") == [(5, 3, 3, 3), (5, 5 * 36)]
    assert isinstance(model, fx.GraphModule) == (how in ("view", "twice"))
    assert (speedup.plan.surgeries[0].graph is not None) == (how in ("view", "twice"))


def test_squeeze_and_excite_with_convolutions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
            self.out = nn.Conv2d(8, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.silu(self.bn(self.conv(x)))
            gate = self.expand(functional.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
            return self.out(x * gate)

    gone = {"conv": [0, 6], "bn": [0, 6], "reduce": [1]}
    model, speedup = speed_up(Net, IMAGES, rows(gone))
    expected = [(6, 3, 3, 3), (3, 6, 1, 1), (6, 3, 1, 1), (5, 6, 3, 3)]
    assert shapes(model, "conv", "reduce", "expand", "out") == expected
    assert speedup.unpruned == ()


@pytest.mark.parametrize("view", [True, False])
def test_squeeze_and_excite_with_linear_layers(view: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Sequential(
                nn.Linear(8, 4, bias=False), nn.ReLU(), nn.Linear(4, 8, bias=False), nn.Hardsigmoid()
            )
            self.out = nn.Conv2d(8, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            b, c = x.shape[:2]
            if view:
                y = self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)
                return self.out(x * y.expand_as(x))
            return self.out(x * self.fc(x.flatten(2).mean(-1)).unsqueeze(-1)[..., None])

    model, _ = speed_up(Net, IMAGES, rows({"conv": [0, 6], "fc.0": [2, 3]}))
    assert shapes(model, "conv", "fc.0", "fc.2", "out") == [(6, 3, 3, 3), (2, 6), (6, 2), (5, 6, 3, 3)]
    assert not isinstance(model, fx.GraphModule)


@pytest.mark.parametrize("native", [True, False])
def test_channel_shuffle(native: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1)
            self.shuffle = nn.ChannelShuffle(3)
            self.out = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if native:
                x = self.shuffle(x)
            else:
                n, c, h, w = x.shape
                x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.out(self.b(x).relu())

    # The same channel of each third: 0, 4, 8 and 1, 5, 9; 2 has no companions.
    model, speedup = speed_up(Net, IMAGES, rows({"a": [0, 4, 8, 1, 5, 9, 2]}))
    assert shapes(model, "a", "b", "out") == [(6, 3, 1, 1), (6, 6, 1, 1), (4, 6, 1, 1)]
    assert [(u.module, u.count) for u in speedup.unpruned] == [("a", 1)]


def test_pixel_shuffle() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.PixelUnshuffle(2)
        )

    model, speedup = speed_up(factory, IMAGES, rows({"0": [0, 4, 5, 6, 7]}))
    assert shapes(model, "0", "3") == [(8, 3, 3, 3), (4, 2, 3, 3)]
    assert [(u.module, u.count) for u in speedup.unpruned] == [("0", 1)]


def test_zero_padded_shortcut() -> None:
    """ResNet's option A: more channels by padding with zeros."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            return self.fc((self.conv(x) + shortcut).relu().mean((2, 3)))

    model, _ = speed_up(Net, IMAGES, rows({"conv": [0, 1, 3, 7], "stem": [1, 2]}))
    # Behind conv, 0, 1 and 7 are zero in both branches, and so is 3 = stem's 1; stem's 2 is conv's 4.
    assert shapes(model, "stem", "conv", "fc") == [(3, 3, 3, 3), (4, 3, 3, 3), (5, 4)]
    assert isinstance(model, fx.GraphModule)


def test_shared_module_called_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
            self.alias = self.shared

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.alias(self.shared(self.a(x)).relu()).relu())

    # One tensor: what goes as its output goes as its input, and as the output of a.
    model, speedup = speed_up(Net, IMAGES, rows({"a": [0, 1, 2], "shared": [1, 2, 3]}))
    assert shapes(model, "a", "shared", "out") == [(6, 3, 3, 3), (6, 6, 3, 3), (4, 6, 1, 1)]
    assert model.alias is model.shared
    assert sum(u.count for u in speedup.unpruned) == 2


def test_different_constants_at_two_calls_of_one_module_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shared = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.a(x)) + 2 * self.shared(self.b(x))

    def masks(model: nn.Module) -> Masks:
        model.b.bias.data[1] = model.a.bias.data[1]
        return row_masks(model, {"a": [0, 1], "b": [0, 1]}, biases=False)

    model, speedup = speed_up(Net, torch.randn(2, 5).double(), masks)
    assert shapes(model, "a", "b", "shared") == [(5, 5), (5, 5), (3, 5)]
    assert {u.reason for u in speedup.unpruned} == {"the module is called several times, with different constants"}


def test_tied_weights_stay_tied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.first, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(self.a(self.first(x))))

    model, _ = speed_up(Net, torch.randn(2, 5).double(), rows({"a": [1], "b": [1], "first": [1]}))
    assert model.a.weight is model.b.weight
    assert shapes(model, "a", "first", "out") == [(7, 7), (7, 5), (3, 7)]


def test_keyword_calls_and_dict_outputs() -> None:
    Output = namedtuple("Output", ["logits", "hidden"])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, inputs: Tensor, scale: Tensor | None = None, *, double: bool = False) -> Any:
            hidden = self.a(input=inputs).relu()
            logits = self.b(input=hidden)
            return {"scores": Output(logits * scale, None), "twice": [logits * 2 if double else logits]}

    example = {"inputs": torch.randn(2, 5).double(), "scale": torch.randn(2, 1).double()}
    model, _ = speed_up(Net, example, rows({"a": [0, 1, 2]}))
    assert shapes(model, "a", "b") == [(5, 5), (3, 5)]
    assert set(model(**example)) == {"scores", "twice"}


def test_rewritten_forward_takes_nested_inputs_and_gives_nested_outputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            self.offset = torch.linspace(0, 1, 3).double()

        def forward(self, pair: Any, *, scale: Tensor) -> Any:
            hidden = self.a(pair[0] + pair[1]["x"]).relu().view(-1, 8)
            return {"y": (self.b(hidden) * scale + self.offset, [hidden.sum(1)]), "n": None}

    def example(size: int) -> dict[str, Any]:
        x = torch.randn(size, 5).double()
        return {"pair": (x, {"x": x}), "scale": torch.randn(size, 1).double()}

    torch.manual_seed(0)
    model = Net().double()
    masks = row_masks(model, {"a": [0, 1, 2]})
    speedup = ModelSpeedup(model, example(2), masks)
    smaller = speedup.speedup_model()
    assert isinstance(smaller, fx.GraphModule)
    assert shapes(smaller, "a", "b") == [(5, 5), (3, 5)]
    plan = Plan.from_json(speedup.plan.to_json())
    again = apply_plan(Net().double(), plan)
    again.load_state_dict(smaller.state_dict())
    simulated = simulate(model, masks)
    for size in (1, 2, 9):
        given = example(size)
        expected = simulated(**given)
        for each in (smaller, again):
            got = each(**given)
            assert torch.allclose(got["y"][0], expected["y"][0])
            assert torch.allclose(got["y"][1][0], expected["y"][1][0])
            assert got["n"] is None


def test_rewritten_forward_still_trains_and_drops_out() -> None:
    def factory() -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.bn, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
                self.fc = nn.Linear(288, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.drop(self.bn(self.conv(x)).view(-1, 288)))

        return Net()

    model, _ = speed_up(factory, IMAGES, rows({"conv": [0], "bn": [0]}))
    model.train()
    before = model.bn.running_mean.clone()
    outputs = [model(IMAGES) for _ in range(2)]
    assert not torch.equal(*outputs)
    assert not torch.equal(before, model.bn.running_mean)
    outputs[0].sum().backward()
    assert model.conv.weight.grad is not None


def test_two_stages() -> None:
    """A second surgery on the first one's result, live and rewritten; one plan replays both."""

    def factory() -> nn.Module:
        return Head("view")

    torch.manual_seed(0)
    model = randomize_(factory())
    first = ModelSpeedup(model, IMAGES, row_masks(model, {"conv": [0, 1]}))
    half = first.speedup_model()
    masks = row_masks(half, {"conv": [2, 5]})
    second = ModelSpeedup(half, IMAGES, masks)
    small = second.speedup_model()
    assert shapes(small, "conv", "fc") == [(4, 3, 3, 3), (5, 4 * 36)]
    assert verify(simulate(half, masks), small, [IMAGES], 1e-10).passed
    plan = Plan.from_json(first.plan.then(second.plan).to_json())
    again = apply_plan(factory().double(), plan)
    again.load_state_dict(small.state_dict())
    assert verify(small, again, [IMAGES], 0.0).passed


def test_masks_on_outputs_and_inputs() -> None:
    """Channels masked at a ReLU's output and at a layer's input are zero there, and go."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.relu, self.b, self.c = (
                nn.Conv2d(3, 8, 3),
                nn.ReLU(),
                nn.Conv2d(8, 6, 3, padding=1),
                nn.Conv2d(6, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.c(input=self.b(self.relu(self.a(x))))

    torch.manual_seed(0)
    model = Net().double()
    outputs, inputs = torch.ones(1, 8, 1, 1).double(), torch.ones(1, 6, 1, 1).double()
    outputs[0, [1, 2]] = 0
    inputs[0, 4] = 0
    speedup = ModelSpeedup(model, IMAGES, {"relu": {"_output_0": outputs}, "c": {"_input_": inputs}})
    small = speedup.speedup_model()
    assert shapes(small, "a", "b", "c") == [(6, 3, 3, 3), (5, 6, 3, 3), (2, 5, 1, 1)]
    assert small.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 3, 8, 8).double()
    hidden = model.relu(model.a(x)) * outputs
    expected = model.c(model.b(hidden) * inputs)
    assert torch.allclose(small(x), expected, atol=1e-12)


def test_a_mask_on_an_output_that_cannot_go_stays_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(5, 4)).double()
    mask = torch.tensor([1.0, 0, 1, 1]).double()
    speedup = ModelSpeedup(model, torch.randn(2, 5).double(), {"0": {"_output_0": mask}})
    small = speedup.speedup_model()
    x = torch.randn(3, 5).double()
    assert torch.equal(small(x), model(x) * mask)
    again = apply_plan(nn.Sequential(nn.Linear(5, 4)).double(), Plan.from_json(speedup.plan.to_json()))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    assert [(u.module, u.count, u.reason) for u in speedup.unpruned] == [("0", 1, "it reaches the model's output")]


def test_unknown_operator_leaves_things_and_names_them() -> None:
    model, speedup = speed_up(Custom, torch.randn(2, 5).double(), rows({"a": [0], "b": [1]}))
    assert shapes(model, "a", "b", "c") == [(8, 5), (5, 8), (3, 5)]
    assert [(u.module, u.count) for u in speedup.unpruned] == [("a", 1)]
    assert "raycomp_test.twice" in speedup.unpruned[0].reason


def test_a_users_rule_makes_it_known() -> None:
    torch.manual_seed(0)
    model = Custom().double()
    masks = row_masks(model, {"a": [0], "b": [1]})
    rules: dict[str, Rule] = {"raycomp_test.twice": Elementwise()}
    speedup = ModelSpeedup(model, torch.randn(2, 5).double(), masks, customized_rules=rules)
    small = speedup.speedup_model()
    assert shapes(small, "a", "b", "c") == [(7, 5), (5, 7), (3, 5)]
    assert verify(simulate(model, masks), small, [torch.randn(8, 5).double()], 1e-10).passed


def test_a_graph_module_traced_in_place_of_the_model() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) if float(x.detach().sum()) > -1e9 else x  # a branch that can't be exported

    torch.manual_seed(0)
    model = Branching().double()
    graph = fx.Graph()
    graph.output(graph.call_module("b", (graph.call_module("a", (graph.placeholder("x"),)),)))
    masks = row_masks(model, {"a": [0, 1]})
    speedup = ModelSpeedup(model, torch.randn(2, 5).double(), masks, graph_module=fx.GraphModule(model, graph))
    small = speedup.speedup_model()
    assert isinstance(small, Branching)
    assert shapes(small, "a", "b") == [(6, 5), (3, 6)]
    assert verify(simulate(model, masks), small, [torch.randn(8, 5).double()], 1e-10).passed


def test_inexact_cuts_everything_that_is_constant_and_says_what_it_costs() -> None:
    torch.manual_seed(0)
    model = randomize_(Residual())
    masks = row_masks(model, {"b1.conv1": [0, 3], "b2.conv1": [1, 2, 7]})
    speedup = ModelSpeedup(model, IMAGES, masks, exact=False)
    small = speedup.speedup_model()
    assert shapes(small, "b1.conv1", "b2.conv1") == [(6, 8, 3, 3), (5, 8, 3, 3)]
    assert speedup.unpruned == ()
    difference = verify(simulate(model, masks), small, [IMAGES], batch_sizes=[2]).relative
    assert speedup.inexact_difference == pytest.approx(difference)
    assert difference > 1e-3


class RandomNet(nn.Module):
    """A random chain of convolutions, norms, activations, shortcuts and concatenations, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def pick(*choices: Any) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=draw))]

        self.kinds: list[str] = []
        self.layers = nn.ModuleList()
        width = 3
        for _ in range(6):
            kind = pick("plain", "plain", "residual", "cat", "depthwise", "grouped", "gate")
            kind = "plain" if width == 3 else kind
            out = pick(8, 12) if kind in ("plain", "grouped") else width
            kernel, padding = pick((1, 0), (3, 1), (3, 1))
            groups = {"depthwise": width, "grouped": pick(2, 4)}.get(kind, 1)
            conv = nn.Conv2d(width, out, kernel, padding=padding, bias=pick(True, False), groups=groups)
            norm = pick(nn.BatchNorm2d(out), nn.BatchNorm2d(out), nn.Identity(), nn.GroupNorm(2, out))
            activation = pick(nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.Sigmoid(), nn.ReLU(inplace=True))
            self.layers.append(nn.Sequential(conv, norm, activation))
            self.kinds.append(kind)
            width = out + width if kind == "cat" else out
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = layer(x)
            if kind == "residual":
                x = x + y
            elif kind == "cat":
                x = torch.cat([x, y], 1)
            elif kind == "gate":
                x = x * y.mean((2, 3), keepdim=True)
            else:
                x = y
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("seed", range(16))
def test_random_networks(seed: int) -> None:
    def masks(model: nn.Module) -> Masks:
        names = [f"layers.{i}.0" for i in range(6)]
        gone: dict[str, Iterable[int]] = dict(random_rows(model, names, seed))
        if seed % 2:  # every second time the norms follow
            for i in range(6):
                if isinstance(model.get_submodule(f"layers.{i}.1"), nn.BatchNorm2d):
                    gone[f"layers.{i}.1"] = gone[f"layers.{i}.0"]
        return row_masks(model, gone, biases=bool(seed % 3))

    model, speedup = speed_up(lambda: RandomNet(seed), IMAGES, masks)
    dense = RandomNet(seed)
    masked_rows = sum(len(gone) for gone in random_rows(dense, [f"layers.{i}.0" for i in range(6)], seed).values())
    left = sum(u.count for u in speedup.unpruned if u.dim == 0 and u.module.endswith(".0"))
    gone_rows = sum(dense.layers[i][0].weight.shape[0] - model.layers[i][0].weight.shape[0] for i in range(6))
    assert gone_rows >= masked_rows - left


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize(("groups", "left"), [(1, 8), (2, 8), (8, 4)])
def test_a_convolution_with_a_computed_weight(groups: int, left: int) -> None:
    def factory() -> nn.Module:
        standardised = Standardised(8, 8, 3, padding=1, groups=groups)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), standardised, nn.Conv2d(8, 2, 1))

    model, _ = speed_up(factory, IMAGES, rows({"0": [0, 1, 4, 5]}))
    assert shapes(model, "0") == [(left, 3, 3, 3)]


def test_attention_whose_heads_are_viewed_beside_a_pruned_layer() -> None:
    """Attention gives its output in strides that a view takes as they are."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o, self.a, self.b = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, width = x.shape
            q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            heads = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = x + self.o(heads.reshape(batch, length, width))
            y = x.clone()
            y[:, 0] = 0
            return y + self.b(functional.gelu(self.a(x)))

    model, _ = speed_up(Net, torch.randn(2, 5, 8).double(), rows({"a": [0, 3, 4, 5, 6, 9, 10, 15]}))
    assert shapes(model, "a", "b") == [(8, 8), (8, 8)]


def test_what_an_auxiliary_head_reads_in_training_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
            self.norm, self.f, self.aux = nn.BatchNorm2d(8), nn.Linear(8, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Any:
            x = functional.relu(self.a(x))
            y = self.f(functional.relu(self.norm(self.b(x))).mean((2, 3)))
            return (y, self.aux(x.mean((2, 3)))) if self.training else y

    model, speedup = speed_up(Net, IMAGES, rows({"a": range(8), "b": range(4), "norm": range(4)}))
    assert shapes(model, "a", "b", "f", "aux") == [(16, 3, 3, 3), (4, 16, 3, 3), (4, 4), (4, 16)]
    assert {(u.module, u.count) for u in speedup.unpruned} == {("a", 8)}
    assert "'aux', which runs in training alone" in speedup.unpruned[0].reason
    expected, got = copy.deepcopy(speedup.simulated).train()(IMAGES), model.train()(IMAGES)
    assert all(torch.allclose(g, e, atol=1e-10) for g, e in zip(got, expected, strict=True))
