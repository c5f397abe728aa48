"""Operators that work on every element by itself, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.rules.base import RULES, Rule


class Elementwise(Rule):
    """Each output element depends on the input elements at its position."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        for output in call.outputs:
            for value in call.inputs:
                offset = output.ndim - value.ndim
                for dim in range(value.ndim):
                    if value.shape[dim] == output.shape[dim + offset]:
                        atoms.same(value, dim, output, dim + offset)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        total = torch.zeros(call.output.shape)
        for value in call.inputs:
            total = total + given[value]
        return [total]


class Dropout(Elementwise):
    """Where it is active in eval mode, too, its results are no constants.

    Args:
        keeps_zeros: whether zeros stay what they are all the same.
    """

    def __init__(self, keeps_zeros: bool) -> None:
        self._keeps_zeros = keeps_zeros

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        result = super().influence(call, given, flow)[0]
        if not call.arguments["train"]:
            return [result]
        return [result + (flow.live(call.inputs[0]) if self._keeps_zeros else 1.0)]


class Product(Elementwise):
    """A product is zero wherever one factor is, whatever the other is."""

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        if len(call.inputs) != 2:
            return super().influence(call, given, flow)
        left, right = call.inputs
        return [(given[left] * flow.live(right) + given[right] * flow.live(left)).expand(call.output.shape)]


class Quotient(Elementwise):
    """Zero divided by anything is zero."""

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        if len(call.inputs) != 2:
            return super().influence(call, given, flow)
        left, right = call.inputs
        return [(given[left] + given[right] * flow.live(left)).expand(call.output.shape)]


class Check(Rule):
    """An assertion about a tensor's type or size: it gives nothing on."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        pass

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        return []


class Filled(Elementwise):
    """A tensor of the shape of another that doesn't depend on its elements."""

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        return [torch.zeros(call.output.shape) + sum(given[v].sum() * 0 for v in call.inputs)]


class Shaped(Elementwise):
    """The first tensor, broadcast to the shape of the others."""

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        first = given[call.inputs[0]]
        return [first.expand(call.output.shape) + sum(given[v].sum() * 0 for v in call.inputs[1:])]


class Gated(Rule):
    """GLU: the first half of a dimension times the sigmoid of the second."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        value, output = call.inputs[0], call.output
        gated = call.arguments["dim"] % value.ndim
        for dim in range(value.ndim):
            if dim != gated:
                atoms.same(value, dim, output, dim)
        left, right = np.split(atoms.ids(value, gated), 2)
        atoms.unite(left, right)
        atoms.bind(output, gated, left)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        left, right = given[call.inputs[0]].chunk(2, dim=call.arguments["dim"])
        return [left + right]


class ChannelSlope(Elementwise):
    """PReLU: one slope for each channel (dimension 1), or one for all."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        value, slope = call.inputs
        for dim in range(value.ndim):
            atoms.same(value, dim, call.output, dim)
        if slope.shape[0] > 1:
            atoms.same(value, 1, slope, 0)

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        value, slope = call.inputs
        shape = [1] * value.ndim
        if slope.shape[0] > 1:
            shape[1] = -1
        return [given[value] + given[slope].reshape(shape)]


_ONE_INPUT = """
abs acos acosh asin asinh atan atanh bitwise_not ceil celu clamp clamp_max clamp_min clone cos cosh deg2rad elu erf erfc
erfinv exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma
log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num neg positive rad2deg reciprocal relu relu6 round
rsqrt rrelu selu sigmoid sign silu sin sinc sinh softplus softshrink softsign special_erf special_expit sqrt square tan
tanh tanhshrink threshold trunc contiguous detach alias
_to_copy to lift_fresh_copy lift_fresh type_as sgn clip
""".split()  # noqa: SIM905
_SEVERAL_INPUTS = """
add sub rsub maximum minimum pow fmod remainder atan2 where lerp eq ne lt le gt ge logical_and
logical_or logical_xor bitwise_and bitwise_or bitwise_xor floor_divide masked_fill addcmul addcdiv hypot fmax fmin copy
fill copysign logaddexp xlogy
""".split()  # noqa: SIM905

RULES.register(Elementwise(), *(f"aten.{name}" for name in (*_ONE_INPUT, *_SEVERAL_INPUTS)))
RULES.register(Elementwise(), "aten.max.other", "aten.min.other")
RULES.register(Dropout(keeps_zeros=True), "aten.dropout", "aten.feature_dropout")
RULES.register(Dropout(keeps_zeros=False), "aten.alpha_dropout", "aten.feature_alpha_dropout")
RULES.register(Product(), "aten.mul")
RULES.register(Quotient(), "aten.div", "aten.true_divide")
RULES.register(Filled(), "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like")
RULES.register(Shaped(), "aten.expand_as")
RULES.register(Check(), "aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar")
RULES.register(Gated(), "aten.glu")
RULES.register(ChannelSlope(), "aten.prelu", "aten._prelu_kernel")
