"""Networks in which channels go together in every way that costs have to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.speedup.cutting import Residual


class Unnormed(nn.Module):
    """A residual sum of which one branch has no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.na(self.a(x)))
        x = x + self.c(functional.relu(self.nb(self.b(x))))
        return self.fc(functional.relu(x).mean((2, 3)))


class Joined(nn.Module):
    """A concatenation, and a head on flattened images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 10, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(16, 10, 1)
        self.fc = nn.Linear(10 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([functional.relu(self.a(x)), functional.relu(self.b(x))], 1)
        return self.fc(functional.relu(self.c(both)).flatten(1))


class Depthwise(nn.Module):
    """A depthwise convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.d, self.nd = nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12)
        self.p, self.np, self.fc = nn.Conv2d(12, 10, 1), nn.BatchNorm2d(10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.nd(self.d(functional.relu(self.na(self.a(x))))))
        return self.fc(functional.relu(self.np(self.p(x))).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution, each group of which loses as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.g, self.ng = nn.Conv2d(16, 24, 3, groups=2), nn.BatchNorm2d(24)
        self.p, self.np, self.fc = nn.Conv2d(24, 12, 1), nn.BatchNorm2d(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.ng(self.g(functional.relu(self.na(self.a(x))))))
        return self.fc(functional.relu(self.np(self.p(x))).mean((2, 3)))


class Transposed(nn.Module):
    """Transposed convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.u, self.p = nn.ConvTranspose2d(12, 16, 3, groups=2), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(functional.relu(self.u(functional.relu(self.t(functional.relu(self.a(x)))))))


class Tokens(nn.Module):
    """Linear layers on sequences, with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 3)
        self.n = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.c(functional.gelu(self.b(functional.gelu(self.a(x))))))


class Case(NamedTuple):
    """A network, its input's shape, and the layers whose channels are pruned."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: tuple[str, ...]


IMAGES = (2, 3, 8, 8)
NETWORKS = {
    "residual": Case(Residual, IMAGES, ("stem", "b1.conv1", "b1.conv2", "b2.conv1", "b2.conv2")),
    "unnormed": Case(Unnormed, IMAGES, ("a", "b", "c")),
    "concatenation": Case(Joined, IMAGES, ("a", "b", "c")),
    "depthwise": Case(Depthwise, IMAGES, ("a", "d", "p")),
    "grouped": Case(Grouped, IMAGES, ("a", "g", "p")),
    "transposed": Case(Transposed, IMAGES, ("a", "t", "u")),
    "tokens": Case(Tokens, (2, 5, 8), ("a", "b")),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network with norms that have statistics, and an input."""
    torch.manual_seed(seed)
    model = NETWORKS[name].make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
    return model, torch.randn(NETWORKS[name].shape, dtype=torch.float64)
