"""What every test of cutting does: mask channels, cut, hold the result against the masked model, replay the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from raycomp.speedup import ModelSpeedup, Plan, apply_plan, verify

Masks = dict[str, dict[str, Tensor]]


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with statistics, weights and biases far from their defaults, in float64 and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        affine = getattr(module, "affine", True) and not isinstance(
            module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        )
        if affine and hasattr(module, "eps") and isinstance(getattr(module, "weight", None), Tensor):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            if isinstance(module.bias, Tensor):
                module.bias.data.uniform_(0.2, 0.8, generator=generator)
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.double().eval()


def row_masks(model: nn.Module, gone: Mapping[str, Iterable[int]], *, biases: bool = True) -> Masks:
    """Masks that zero rows (dimension 0) of the weights of modules, and their biases with them."""
    masks: Masks = {}
    for name, rows in gone.items():
        module = model.get_submodule(name)
        for target in ("weight", "bias") if biases else ("weight",):
            parameter = getattr(module, target, None)
            if isinstance(parameter, Tensor):
                mask = torch.ones_like(parameter)
                mask[list(rows)] = 0
                masks.setdefault(name, {})[target] = mask
    return masks


def random_rows(model: nn.Module, names: Iterable[str], seed: int = 0, ratio: float = 0.5) -> dict[str, list[int]]:
    """For each module, `ratio` of the rows of its weight, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        size = model.get_submodule(name).weight.shape[0]  # type: ignore[union-attr, index]
        found[name] = torch.randperm(size, generator=generator)[: int(size * ratio)].tolist()
    return found


class StrictSpeedup(ModelSpeedup):
    """The check of the cut model, which would mend a wrong analysis by cutting less, fails the test instead."""

    def _operate(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._operate(*args, **kwargs)
        assert made is not None, "the analysis was wrong, or the forward could not be rewritten"
        return made


def speed_up(
    factory: Callable[[], nn.Module],
    example: Tensor | tuple[Tensor, ...] | dict[str, Tensor],
    masks: Masks | Callable[[nn.Module], Masks],
    tolerance: float = 1e-10,
) -> tuple[Any, ModelSpeedup]:
    """Cuts a randomized model and checks that outputs, replay and input model are right."""
    torch.manual_seed(0)
    model = randomize_(factory())
    masks = masks(model) if callable(masks) else masks
    before = copy.deepcopy(model.state_dict())
    speedup = StrictSpeedup(model, example, masks)
    smaller = speedup.speedup_model()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    others = [pytree.tree_map(fresh, example) for _ in range(2)]
    verification = verify(simulate(model, masks), smaller, [example, *others], tolerance)
    assert verification.passed, verification
    plan = Plan.from_json(speedup.plan.to_json())
    assert plan == speedup.plan
    again = apply_plan(factory().double().eval(), plan)
    again.load_state_dict(smaller.state_dict(), strict=True)
    assert verify(smaller, again, [example], 0.0).passed
    return smaller, speedup


def fresh(leaf: object) -> object:
    """Another input of the same kind."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.randn(leaf.shape[0] + 6, *leaf.shape[1:]).to(leaf) * 2
    return leaf


def simulate(model: nn.Module, masks: Masks) -> nn.Module:
    """The masked model, made here by hand: parameters times masks."""
    simulated = copy.deepcopy(model)
    for name, targets in masks.items():
        for target, mask in targets.items():
            if not target.startswith("_"):
                getattr(simulated.get_submodule(name), target).data.mul_(mask)
    return simulated


def shapes(model: nn.Module, *names: str) -> list[tuple[int, ...]]:
    """The shapes of modules' weights."""
    return [tuple(model.get_submodule(name).weight.shape) for name in names]  # type: ignore[union-attr, arg-type]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b1, self.b2 = Block(width), Block(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)), inplace=True)
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(self.b2(self.b1(x)), 1), 1))


torch.library.define("raycomp_test::twice", "(Tensor x) -> Tensor")


@torch.library.impl("raycomp_test::twice", "CompositeExplicitAutograd")
def _twice(x: Tensor) -> Tensor:
    return x * 2


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.ops.raycomp_test.twice(self.a(x))))
