"""The model that int8 lowering starts from: folded, evaluated in float32, with every calibrated target on its grid.

The same module serves twice: run, it is the fake-quantized reference of the int8 model; exported inside `lowering`, its
quantizers turn into `raycomp::FakeQuantize` nodes, which `raycomp.deploy.int8.qdq` makes integers of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.config import nearest
from raycomp.core.attach import TargetSpace
from raycomp.core.calibration import canonical_calibration
from raycomp.core.folding import Hosted
from raycomp.core.target import TargetId
from raycomp.deploy.int8.fold import fold_
from raycomp.deploy.int8.grid import Grid, grid_of, in_blocks, on_blocks_grid
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.program import as_float32

FAKE_QUANTIZE = "FakeQuantize"
DOMAIN = "raycomp"

_lowering: ContextVar[bool] = ContextVar("raycomp_lowering", default=False)


@contextmanager
def lowering() -> Iterator[None]:
    """While it is open, grid quantizers trace as ONNX nodes instead of computing."""
    token = _lowering.set(True)
    try:
        yield
    finally:
        _lowering.reset(token)


class GridQuantizer(nn.Module):
    """Puts values on a fixed grid.

    Args:
        grid: the numbers that may come out.
        name: the target's name, for the exported graph.
    """

    def __init__(self, grid: Grid, name: str) -> None:
        super().__init__()
        self.grid = grid
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """The nearest numbers of the grid; inside `lowering` an ONNX node of the same meaning."""
        if not _lowering.get():
            return self.grid.fake_quantize(x)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{FAKE_QUANTIZE}",
            (x,),
            {"grid": self.grid.to_text(), "target": self.name},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


def simulate_int8(
    model: nn.Module,
    calibration: Mapping[str, Mapping[str, Mapping[str, Any]]],
    folds: Sequence[Sequence[str]] = (),
    *,
    reduce_range: bool = False,
) -> nn.Module:
    """A copy of the model that computes in float32 what the int8 model computes in integers.

    Args:
        model: a float model of the user's classes alone, in any dtype and on any device; it is left alone.
        calibration: scales and zero points of each module's targets.
        folds: which modules the first of each tuple hosts.
        reduce_range: 8-bit weights on 7-bit grids of twice the scale, as without VNNI.

    Returns:
        the copy, on the CPU and in eval mode.

    Raises:
        CompressionError: the calibration is none.
        SpeedupError: calibration or folds name what the model does not have, or grids that cannot be stored.
    """
    copied = as_float32(model)
    judged = canonical_calibration(calibration, ("scale", "zero_point", "quant_min", "quant_max"))
    for name in judged:
        _check_module(copied, name)
    grids = {TargetId(name, target): entry for name, targets in judged.items() for target, entry in targets.items()}
    for host in [fold[0] for fold in folds if TargetId(fold[0], "bias") in grids]:
        # A bias is quantized as it is, before a norm is folded into it; a weight afterwards.
        bias = TargetId(host, "bias")
        _check(copied, bias)
        parameter = copied.get_submodule(host).get_parameter("bias")
        parameter.data = grid_of(grids.pop(bias), str(bias)).fake_quantize(parameter.data)
    for target_id in [key for key, entry in grids.items() if not key.target.startswith("_") and in_blocks(entry)]:
        # No kernel takes such scales: the weight keeps the numbers of its grid, as floats.
        _check(copied, target_id)
        parameter = copied.get_submodule(target_id.module).get_parameter(target_id.target)
        parameter.data = on_blocks_grid(parameter.data, grids.pop(target_id))
    space = TargetSpace(copied)
    fold_(space, folds)
    for target_id, entry in grids.items():
        _check(copied, target_id)
        grid = grid_of(entry, str(target_id))
        if reduce_range and target_id.target == "weight" and grid.bits == 8:
            grid = grid.halved()
        space.target(target_id).set_quantizer(GridQuantizer(grid, str(target_id)), "int8")
    return copied


def _check(model: nn.Module, target_id: TargetId) -> None:
    module = model.get_submodule(target_id.module)
    lacks = isinstance(module, Hosted) or module._parameters.get(target_id.target) is None
    if not target_id.target.startswith("_") and lacks:
        raise SpeedupError(
            f"{type(module).__name__} {target_id.module!r} has no parameter {target_id.target!r} to quantize",
            where=str(target_id),
            remedy="a folded batch norm or an absent bias has no scale of its own",
        )


def _check_module(model: nn.Module, name: str) -> None:
    names = dict(model.named_modules(remove_duplicate=False))
    if name not in names:
        message = f"the calibration names {name!r}, which the model does not have"
        raise SpeedupError(message, remedy=nearest(name, names))
