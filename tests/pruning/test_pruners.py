"""Pruners on models: NNI's golden values, schedules, monotone masks, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycomp import TorchEvaluator
from raycomp.core.attach import is_wrapped
from raycomp.errors import CompressionError, ConfigError, NotFiniteError
from raycomp.pruning import AGPPruner, FPGMPruner, L1NormPruner, LinearPruner, TaylorPruner


class Net(nn.Module):
    """A linear layer with the weight 1..16, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)
        with torch.no_grad():
            self.fc1.weight.copy_(torch.arange(1.0, 17).view(4, 4))
            self.fc2.weight.copy_(torch.ones(4, 4))

    def forward(self, value: Tensor) -> Tensor:
        return self.fc2(self.fc1(value))


def l1_masks(*config_list: dict[str, Any], model: nn.Module | None = None) -> dict[str, dict[str, Tensor]]:
    return L1NormPruner(model or Net(), list(config_list)).compress()[1]


def fc1(**settings: Any) -> dict[str, Any]:
    return {"op_names": ["fc1"], **settings}


def test_output_channels_and_their_bias_go_together() -> None:
    masks = l1_masks(fc1(sparse_ratio=0.6))
    assert masks["fc1"]["weight"].tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    assert masks["fc1"]["bias"].tolist() == [0, 0, 1, 1]


def test_input_channels_go_and_the_bias_stays() -> None:
    masks = l1_masks(fc1(sparse_ratio=0.5, granularity="in_channel"))
    assert masks["fc1"]["weight"].tolist() == [[0, 0, 1, 1]] * 4
    assert masks["fc1"]["bias"].tolist() == [1, 1, 1, 1]


def test_single_elements_half() -> None:
    masks = l1_masks(fc1(sparse_ratio=0.5, granularity=[1, 1]))
    assert masks["fc1"]["weight"].flatten().tolist() == [0] * 8 + [1] * 8
    assert masks["fc1"]["bias"].tolist() == [0, 0, 1, 1]


def test_a_threshold_and_its_clamp() -> None:
    weight = l1_masks(fc1(sparse_threshold=6, granularity=[1, 1]))["fc1"]["weight"]
    assert torch.equal(weight, (torch.arange(1.0, 17) >= 6).float().view(4, 4))
    weight = l1_masks(fc1(sparse_threshold=6, max_sparse_ratio=0.2, granularity=[1, 1]))["fc1"]["weight"]
    assert weight.flatten().tolist() == [0] * 3 + [1] * 13


def test_settings_of_a_target_go_before_those_of_the_entry() -> None:
    model = Net()
    with torch.no_grad():
        model.fc1.bias.copy_(torch.tensor([4.0, 3, 2, 1]))
    entry = fc1(sparse_ratio=0.5, target_settings={"bias": {"sparse_ratio": 0.25}})
    masks = l1_masks(entry, model=model)
    assert masks["fc1"]["weight"][:, 0].tolist() == [0, 0, 1, 1]
    assert masks["fc1"]["bias"].tolist() == [1, 1, 1, 0]


def test_a_global_group_over_two_layers() -> None:
    model = Net()
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([0.5, 1, 1.5, 2]).view(4, 1).expand(4, 4))
        model.fc2.weight.copy_(torch.tensor([20, 1.5, 1, 0.5]).view(4, 1).expand(4, 4))
    masks = l1_masks({"op_types": ["Linear"], "sparse_ratio": 0.5, "global_group_id": "g"}, model=model)
    assert masks["fc1"]["bias"].tolist() == [0, 0, 1, 1]
    assert masks["fc2"]["bias"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("schedule", "sparsities"),
    [(AGPPruner, [0.375, 0.625, 0.6875, 0.75]), (LinearPruner, [0.1875, 0.375, 0.5625, 0.75])],
)
def test_schedules_reach_their_golden_sparsities(schedule: type, sparsities: list[float]) -> None:
    model = Net()
    inner = L1NormPruner(model, [fc1(sparse_ratio=0.75, granularity=[1, 1], target_names=["weight"])])
    pruner = schedule(inner, 2, 4)
    seen = [1 - float(mask.mean()) for mask in masks_while_training(pruner, model, 8)]
    assert [seen[step - 1] for step in (2, 4, 6, 8)] == sparsities
    assert [seen[step - 1] for step in (1, 3, 5, 7)] == [0.0, *sparsities[:-1]]


def masks_while_training(
    pruner: Any, model: nn.Module, steps: int, change: Callable[[int], None] = lambda step: None
) -> list[Tensor]:
    """The mask of fc1.weight after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    with pruner.chain.run([optimizer]):
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            change(step)
            optimizer.step()
            seen.append(pruner.get_masks()["fc1"]["weight"])
    return seen


def test_a_mask_never_grows_back_over_a_schedule() -> None:
    model = Net()
    pruner = AGPPruner(L1NormPruner(model, [fc1(sparse_ratio=0.75, granularity=[1, 1])]), 1, 4)

    def turn(step: int) -> None:
        # The ranking is another one at each decision.
        with torch.no_grad():
            model.fc1.parametrizations.weight.original.copy_(torch.randperm(16).view(4, 4))

    torch.manual_seed(0)
    seen = masks_while_training(pruner, model, 4, turn)
    for before, after in pairwise(seen):
        assert bool((after <= before).all())
    assert [float(mask.sum()) for mask in seen] == [10, 6, 5, 4]


def test_taylor_sums_over_the_steps_before_each_decision() -> None:
    model = Net()
    pruner = TaylorPruner(model, [fc1(sparse_ratio=0.5)], training_steps=2)
    original = model.fc1.parametrizations.weight.original
    gradients = [torch.zeros(4, 4) for _ in range(3)]
    # Rows of the weight are 1-4, 5-8, 9-12, 13-16; the square of each product counts.
    gradients[0][0, 0], gradients[0][3, 0] = 10.0, 0.5  # (1·10)² = 100, (13·0.5)² = 42.25
    gradients[1][1, 0], gradients[1][3, 0] = -1.0, -0.5  # (5·-1)² = 25, 42.25: the sum is 84.5, not 0
    gradients[1][2, 0] = 0.1  # (9·0.1)² = 0.81

    def give(step: int) -> None:
        original.grad = gradients[step - 1].clone()

    seen = masks_while_training(pruner, model, 2, give)
    assert seen[0].min() == 1
    assert seen[1][:, 0].tolist() == [1, 0, 0, 1]


def test_under_a_schedule_taylor_counts_the_last_steps_before_each_decision() -> None:
    model = Net()
    pruner = LinearPruner(TaylorPruner(model, [fc1(sparse_ratio=0.5)], training_steps=1), 2, 2)
    original = model.fc1.parametrizations.weight.original

    def give(step: int) -> None:
        # Steps 1 and 3 say that the last row is unimportant, steps 2 and 4 that the first ones are.
        importance = [9.0, 9, 9, 0] if step % 2 else [0.0, 1, 2, 3]
        original.grad = torch.tensor(importance).view(4, 1).expand(4, 4) / original.detach()

    seen = masks_while_training(pruner, model, 4, give)
    assert [mask[:, 0].tolist() for mask in seen] == [[1] * 4, [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_a_window_longer_than_the_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="interval_steps 2 is below the pruner's training_steps 3"):
        AGPPruner(TaylorPruner(Net(), [fc1(sparse_ratio=0.5)], training_steps=3), 2, 2)


def test_a_schedule_takes_a_basic_pruner_alone() -> None:
    inner = AGPPruner(L1NormPruner(Net(), [fc1(sparse_ratio=0.5)]), 2, 2)
    with pytest.raises(ConfigError, match="LinearPruner: it goes around a pruner, not a AGPPruner"):
        LinearPruner(inner, 2, 2)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_not_ranked() -> None:
    model = Net()
    with torch.no_grad():
        model.fc1.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"the saliency of fc1\.weight is not finite"):
        L1NormPruner(model, [fc1(sparse_ratio=0.5)]).compress()


def test_groups_that_do_not_fit_are_refused() -> None:
    entries = [
        fc1(sparse_ratio=0.5, dependency_group_id="d"),
        {"op_names": ["fc2"], "sparse_ratio": 0.25, "dependency_group_id": "d"},
    ]
    with pytest.raises(ConfigError, match="share a dependency group, but differ in sparse_ratio"):
        l1_masks(*entries)


def test_activations_that_can_not_be_ranked_and_blocks_that_do_not_divide_are_told() -> None:
    with pytest.raises(ConfigError) as raised:
        FPGMPruner(
            Net(),
            [
                fc1(sparse_ratio=0.5, target_names=["_output_"]),
                {"op_names": ["fc2"], "sparse_ratio": 0.5, "granularity": [3], "target_names": ["weight"]},
            ],
        )
    remedy = "(align it to a parameter of a module)"
    assert [str(problem) for problem in raised.value.problems] == [
        f"config_list[0]: fc1._output_0: FPGMPruner can't rank inputs or outputs {remedy}",
        "config_list[1].granularity: fc2.weight: blocks of (1, 3) don't divide the target's shape (4, 4)",
    ]


def test_masks_that_were_stored_can_be_set() -> None:
    model = Net()
    pruner = L1NormPruner(model, [fc1(sparse_ratio=0.5)])
    masks = pruner.compress()[1]
    again = L1NormPruner(Net(), [fc1(sparse_ratio=0.5)])
    again.update_masks(masks)
    assert torch.equal(again.get_masks()["fc1"]["weight"], masks["fc1"]["weight"])
    assert torch.equal(again.model.fc1.weight, model.fc1.weight)
    with pytest.raises(CompressionError, match=r"fc2.weight: .* no such target \(did you mean 'fc1.weight'"):
        again.update_masks({"fc2": {"weight": torch.ones(4, 4)}})
    with pytest.raises(CompressionError, match=r"the mask's shape is \(4, 1\), the parameter's \(4, 4\)"):
        again.update_masks({"fc1": {"weight": torch.ones(4, 1)}})


def test_bypass_masks_and_changes_nothing() -> None:
    model = Net()
    before = model.fc1.weight.detach().clone()
    pruner = L1NormPruner(model, [fc1(sparse_ratio=0.5, apply_method="bypass", target_names=["weight"])])
    pruner.compress()
    assert float(pruner.get_masks()["fc1"]["weight"].mean()) == 0.5
    assert torch.equal(model.fc1.weight, before)
    pruner.unwrap_model()
    assert torch.equal(model.fc1.weight, before)


def test_masks_of_two_pruners_on_one_target_multiply() -> None:
    model = Net()
    rows = L1NormPruner(model, [fc1(sparse_ratio=0.5, target_names=["weight"])])
    columns = L1NormPruner.from_compressor(
        rows, [fc1(sparse_ratio=0.25, granularity="in_channel", target_names=["weight"])]
    )
    rows.chain.begin()
    assert rows.get_masks()["fc1"]["weight"].tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    assert columns.get_masks()["fc1"]["weight"].tolist() == [[0, 1, 1, 1]] * 4
    both = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert rows.chain.masks()["fc1"]["weight"].tolist() == both
    seen = [[value * keep for value, keep in zip(*row)] for row in zip(torch.arange(1.0, 17).view(4, 4).tolist(), both)]
    assert model.fc1.weight.tolist() == seen
    rows.unwrap_model()
    assert model.fc1.weight.tolist() == seen


def test_a_script_that_goes_on_trains_the_steps_that_are_left() -> None:
    pruner = TaylorPruner(Net(), [fc1(sparse_ratio=0.5)], training_steps=5)
    assert pruner.steps_to_go() == 5
    pruner.chain.step = 2
    assert pruner.steps_to_go() == 3
    pruner.chain.step = 5
    assert pruner.steps_to_go() is None


@pytest.mark.parametrize("wraps", [lambda pruner: pruner, lambda pruner: AGPPruner(pruner, 1, 1)])
def test_wrapping_puts_every_target_back_once(wraps: Callable[[Any], Any]) -> None:
    pruner = wraps(L1NormPruner(Net(), [fc1(sparse_ratio=0.5)]))
    pruner.unwrap_model()
    assert not is_wrapped(pruner.model)
    for _ in range(2):
        pruner.wrap_model()
        assert is_wrapped(pruner.model)
        assert [len(target.masks) for target in pruner.chain.space.targets.values()] == [1, 1]


@pytest.mark.parametrize(
    ("weights", "sums"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_saliencies_add_up_at_least_in_float32(weights: torch.dtype, sums: torch.dtype) -> None:
    pruner = TaylorPruner(Net().to(weights), [fc1(sparse_ratio=0.5)], training_steps=1)
    assert {statistic.tensor.dtype for statistic in pruner.statistics()} == {sums}


def train_alone(model: nn.Module, frozen: str = "") -> TorchEvaluator:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))

    def train(model: Any, optimizer: Any, step: Any, schedulers: Any, max_steps: int, max_epochs: Any) -> None:
        for number in range(max_steps):
            optimizer.zero_grad()
            step(torch.randn(8, 4, generator=torch.Generator().manual_seed(number)), model).backward()
            optimizer.step()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TorchEvaluator(train, torch.optim.SGD(trained, 0.01), lambda batch, model: model(batch).square().mean())


def test_a_frozen_layer_is_told_and_left_whole() -> None:
    """Its gradients are 0 everywhere, so nothing says which channels matter."""
    model = Net()
    pruner = TaylorPruner(model, [fc1(sparse_ratio=0.5)], train_alone(model, "fc1"), training_steps=2)
    with pytest.warns(UserWarning, match=r"TaylorPruner: fc1\.weight: all saliencies are the same"):
        _, masks = pruner.compress()
    assert bool(masks["fc1"]["weight"].all()) and bool(masks["fc1"]["bias"].all())


def test_compressing_again_asks_how_long() -> None:
    model = Net()
    pruner = TaylorPruner(model, [fc1(sparse_ratio=0.5)], train_alone(model), training_steps=2)
    pruner.compress()
    with pytest.raises(CompressionError, match=r"has trained already, 2 steps \(to train on, say how long"):
        pruner.compress()
    pruner.compress(max_steps=3)
    assert pruner.chain.step == 5


def test_compressing_again_trains_what_is_left_until_the_last_decision() -> None:
    model = Net()
    pruner = TaylorPruner(model, [fc1(sparse_ratio=0.5)], train_alone(model), training_steps=4)
    with pytest.warns(UserWarning, match="the goal is not reached"):
        pruner.compress(max_steps=3)
    assert bool(pruner.get_masks()["fc1"]["weight"].all())
    pruner.compress()
    assert pruner.chain.step == 4
    assert int((pruner.get_masks()["fc1"]["bias"] == 0).sum()) == 2


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((32, 6, 1, 1), r"its first dimension is not the batch's"),
        ((6,), r"its first dimension is not the batch's"),
        ((1, 6, 1), r"it has 3 dimensions \(should have 4, or be \[1, channels\]\)"),
        ((1, 6, 1, 1, 1), r"it has 5 dimensions"),
    ],
)
def test_a_mask_of_an_output_that_doesn_t_fit_names_itself(shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(CompressionError, match=rf"0\._output_0: the mask's shape is {re.escape(str(shape))}: {told}"):
        _aligned().update_masks({"0": {"_output_": torch.ones(shape)}})


@pytest.mark.parametrize("shape", [(1, 5), (1, 6, 1, 9)])
def test_a_mask_that_a_forward_pass_finds_not_to_fit_names_itself(shape: tuple[int, ...]) -> None:
    pruner = _aligned()
    pruner.update_masks({"0": {"_output_0": torch.ones(shape)}})
    with pytest.raises(CompressionError, match=r"0\._output_0: .* and the value's \(2, 6, 5, 5\)"):
        pruner.model(torch.ones(2, 3, 5, 5))


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1, 1), (1, 6, 5, 5), ()])
def test_a_mask_of_an_output_may_have_any_form_that_broadcasts(shape: tuple[int, ...]) -> None:
    pruner = _aligned()
    whole = pruner.model(torch.ones(2, 3, 5, 5))
    pruner.update_masks({"0": {"_output_": torch.zeros(shape)}})
    assert bool(whole.any()) and not pruner.model(torch.ones(2, 3, 5, 5)).any()


def _aligned() -> L1NormPruner:
    """A pruner whose masks of outputs follow those of the weight."""
    align = {"module_name": "0", "target_name": "weight"}
    entries = [
        {"op_names": ["0"], "sparse_ratio": 0.5},
        {"op_names": ["0"], "target_names": ["_output_0"], "align": align},
    ]
    return L1NormPruner(nn.Sequential(nn.Conv2d(3, 6, 1)), entries)
