"""A float model and its calibration in, an int8 ONNX model out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.calibration import canonical_calibration
from raycomp.deploy.int8.reference import lowering, simulate_int8
from raycomp.deploy.measure import hardware
from raycomp.deploy.onnx_export import OnnxExport, export_to_ir
from raycomp.deploy.onnx_file import OnnxSignature
from raycomp.deploy.onnx_runtime import Execution, OnnxModule, execution
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example
from raycomp.speedup.graph.program import example_as_float32


@dataclass(frozen=True)
class Int8Model:
    """An int8 model as ONNX (QDQ), with the scales and zero points that training learned.

    Args:
        onnx: the serialized model.
        signature: how it is called.
        weight_bytes: bytes of all its constants: integers, scales, zero points, and what stayed float.
        float_weight_bytes: bytes of the float model's parameters and buffers in float32.
        reduce_range: whether 8-bit weights were put on 7-bit grids.
        vnni: whether this machine multiplies 8-bit integers without saturation.
        grown_scales: weights whose learned scale had to grow so that the bias fits into int32.
        fixed: sizes that it takes alone, though the inputs that it was exported for differ there.
        layers: those that have integer weights.
        hindrances: why some of them have no integer kernel, with the remedy.
    """

    onnx: bytes
    signature: OnnxSignature
    weight_bytes: int
    float_weight_bytes: int
    reduce_range: bool
    vnni: bool
    grown_scales: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    hindrances: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the ONNX file."""
        Path(path).write_bytes(self.onnx)

    def as_module(self, *, threads: int | None = None, cuda: bool = False) -> OnnxModule:
        """The model in ONNX Runtime, with the call signature of the float model."""
        return OnnxModule(self.onnx, threads=threads, cuda=cuda)

    @cached_property
    def execution(self) -> Execution:
        """Which operators ONNX Runtime runs for this model on this machine's CPU."""
        return execution(self.onnx)

    @cached_property
    def float_layers(self) -> tuple[str, ...]:
        """The layers with integer weights that ONNX Runtime nevertheless computes in float on this machine."""
        from raycomp.deploy.int8.hindrances import layer_of

        found = map(layer_of, self.execution.dequantized)
        return tuple(dict.fromkeys(layer for layer in found if layer is not None))

    @property
    def float_causes(self) -> dict[str, str]:
        """Why it computes each of them in float, with the remedy where there is one."""
        unknown = "ONNX Runtime has no integer kernel for it as it stands in the model"
        return {layer: self.hindrances.get(layer, unknown) for layer in self.float_layers}


def lower_int8(
    model: nn.Module,
    calibration: Mapping[str, Mapping[str, Mapping[str, Any]]],
    folds: Sequence[Sequence[str]],
    example: Example,
    *,
    others: Sequence[Example] = (),
    reduce_range: bool | None = None,
) -> Int8Model:
    """Lowers a model to integers on the grids of its calibration.

    Activations are stored as unsigned 8-bit integers and weights as signed ones, whatever the sign of their grids: the
    zero point moves along, the numbers stay. Biases become int32 in units of input scale times weight scale. Widths
    below 8 bits are stored in 8, with their own range; 9 to 16 bits in 16.

    Args:
        model: a float model without compressors, in any dtype and on any device; it is left alone.
        calibration: scales and zero points of each module's targets.
        folds: which modules (batch norms, activations) the first of each tuple hosts.
        example: an input to trace with.
        others: further inputs, of other lengths or image sizes: what differs stays open where it can.
        reduce_range: 8-bit weights as 7-bit ones of twice the scale. Without VNNI, sums of two products saturate at 16
            bits otherwise; None decides by this machine.

    Raises:
        CompressionError: the calibration is none: another form, or numbers that no range has.
        SpeedupError: the calibration does not fit the model, or the model cannot be exported.
    """
    machine = hardware()
    reduced = not machine.vnni if reduce_range is None else reduce_range
    exported, grown = _exported(model, calibration, folds, example, others, reduced)
    content, fixed = exported.serialized({"reduce_range": reduced})
    initializers = exported.graph.graph.initializers.values()
    tensors = [value.const_value for value in initializers if value.const_value is not None]
    state = [*model.parameters(), *model.buffers()]
    from raycomp.deploy.int8.hindrances import hindrances, layer_of

    stored = [layer_of(value.name or "") for value in initializers]
    return Int8Model(
        onnx=content,
        signature=exported.signature,
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        float_weight_bytes=4 * sum(tensor.numel() for tensor in state),
        reduce_range=reduced,
        vnni=machine.vnni,
        grown_scales=grown,
        fixed=fixed,
        layers=tuple(dict.fromkeys(layer for layer in stored if layer is not None)),
        hindrances=hindrances(exported.graph.graph),
    )


def foreseen_hindrances(
    model: nn.Module,
    calibration: Mapping[str, Mapping[str, Mapping[str, Any]]],
    folds: Sequence[Sequence[str]],
    example: Example,
) -> dict[str, str]:
    """Which layers of the int8 model would be computed in float, and why, without making it.

    Args:
        model, folds, example: as `lower_int8` takes them.
        calibration: of the form that it will have; the values of the scales don't count.

    Raises:
        CompressionError, SpeedupError: as `lower_int8`.
    """
    exported, _ = _exported(model, calibration, folds, example, (), reduced=False)
    from raycomp.deploy.int8.hindrances import hindrances

    return hindrances(exported.graph.graph)


def _exported(
    model: nn.Module,
    calibration: Mapping[str, Mapping[str, Mapping[str, Any]]],
    folds: Sequence[Sequence[str]],
    example: Example,
    others: Sequence[Example],
    reduced: bool,
) -> tuple[OnnxExport, tuple[str, ...]]:
    """The lowered graph, and the weights whose scales had to grow."""
    if not any(canonical_calibration(calibration).values()):
        raise SpeedupError("the calibration is empty: nothing was quantized", remedy="run a quantizer first")
    reference = simulate_int8(model, calibration, folds, reduce_range=reduced)
    with lowering():
        exported = export_to_ir(reference, example_as_float32(example), [*map(example_as_float32, others)])
    from raycomp.deploy.int8.qdq import to_qdq_

    return exported, to_qdq_(exported.graph)


def sqnr_db(reference: Tensor, real: Tensor) -> float:
    """The signal-to-noise ratio `10 log10(sum(reference²) / sum((reference - real)²))` in dB; inf where they agree."""
    signal = reference.detach().double()
    noise = signal - real.detach().double().to(signal.device)
    power = float((noise**2).sum())
    return float("inf") if power == 0 else 10 * float(torch.log10((signal**2).sum() / power))
