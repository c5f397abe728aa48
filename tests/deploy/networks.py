"""Small networks and calibrations for the tests of lowering, export and measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.parts import as_call

Calibration = dict[str, dict[str, dict[str, Any]]]


class ResidualNet(nn.Module):
    """Convolution, a residual block with a strided shortcut, and a classifier; every convolution has a batch norm."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.stem_relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.shortcut_bn = nn.BatchNorm2d(2 * width)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem_relu(self.stem_bn(self.stem(x))))
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        x = self.relu2(y + self.shortcut_bn(self.shortcut(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


RESIDUAL_FOLDS = [("stem", "stem_bn"), ("conv1", "bn1"), ("conv2", "bn2"), ("shortcut", "shortcut_bn")]


def randomize_norms_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with statistics, weights and biases far from their defaults; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                assert isinstance(tensor, Tensor)
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def entry(
    low: Tensor, high: Tensor, dtype: str = "int8", scheme: str = "symmetric", axis: int | None = None
) -> dict[str, Any]:
    """A calibration entry for a range, by the formulas of the documentation, in plain double arithmetic."""
    bits = int(dtype.lstrip("uint"))
    qmin, qmax = (0, 2**bits - 1) if dtype.startswith("u") else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if scheme == "symmetric":
        scale = torch.maximum(-low, high) / ((qmax - qmin) / 2)
        zero_point = torch.full_like(scale, (qmax + qmin + 1) // 2)
    else:
        scale = (high - low) / (qmax - qmin)
        zero_point = (qmin - torch.round(low / scale.clamp(min=2**-23))).clamp(qmin, qmax)
    return {
        "scale": scale.clamp(min=2**-23).float(),
        "zero_point": zero_point.float(),
        "quant_dtype": dtype,
        "quant_scheme": scheme,
        "quant_bits": bits,
        "tracked_min": low.float(),
        "tracked_max": high.float(),
        "quant_min": qmin,
        "quant_max": qmax,
        "axis": axis,
    }


def calibrate(
    model: nn.Module,
    x: Tensor | dict[str, Tensor],
    layers: Sequence[str],
    *,
    folds: Sequence[Sequence[str]] = (),
    activation: tuple[str, str] = ("int8", "symmetric"),
    weight: tuple[str, str] = ("int8", "symmetric"),
    per_channel: bool = False,
    outputs: bool = True,
) -> Calibration:
    """Ranges of inputs, outputs and (folded) weights as one pass over `x` shows them."""
    calibration: Calibration = {name: {} for name in layers}
    hosted = {fold[0]: fold[-1] for fold in folds}
    norms = {
        fold[0]: fold[1] for fold in folds if isinstance(model.get_submodule(fold[1]), nn.modules.batchnorm._BatchNorm)
    }
    handles = []
    for name in layers:
        module = model.get_submodule(name)

        def see_input(_m: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            calibration[name]["_input_0"] = entry(args[0].amin(), args[0].amax(), *activation)

        handles.append(module.register_forward_pre_hook(see_input))
        if outputs:

            def see_output(_m: nn.Module, _a: Any, output: Tensor, name: str = name) -> None:
                calibration[name]["_output_0"] = entry(output.amin(), output.amax(), *activation)

            handles.append(model.get_submodule(hosted.get(name, name)).register_forward_hook(see_output))
        if isinstance(getattr(module, "weight", None), Tensor):
            w: Tensor = module.weight.detach()  # type: ignore[operator]
            if name in norms:
                bn: Any = model.get_submodule(norms[name])
                factor = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach()
                w = w * factor.view(-1, *[1] * (w.ndim - 1))
            dims = tuple(range(1, w.ndim))
            low, high = (w.amin(dims, True), w.amax(dims, True)) if per_channel else (w.amin(), w.amax())
            calibration[name]["weight"] = entry(low, high, *weight, axis=0 if per_channel else None)
    args, kwargs = as_call(x)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return calibration
