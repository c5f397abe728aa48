"""Operators that sum over a dimension against weights: convolutions, linear layers, matrix products.

A removed input must add nothing, or a constant that the bias can absorb: x_c = k for all positions of channel c adds
k * sum(W[o, c]) to output o, which is the same at every position only where no padding cuts the kernel off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from raycomp.speedup.graph.atoms import Atoms, Ids
from raycomp.speedup.graph.flow import Flow
from raycomp.speedup.graph.graph import Call, Value
from raycomp.speedup.rules.base import (
    RULES,
    Absorption,
    Channels,
    NewAttribute,
    Rule,
    Sink,
    Sizes,
    Work,
    tensor_argument,
)


@dataclass(frozen=True)
class Contraction:
    """One call, in the words that all contractions share.

    Args:
        value, weight, bias, output: its tensors.
        dim: the contracted dimension of `value`; that of `output` has the same index from the end of the batch.
        weight_inputs: the weight's dimension over inputs, within one group.
        groups: the number of groups.
        uniform: whether a constant input adds the same at all positions.
    """

    value: Value
    weight: Value
    bias: Value | None
    output: Value
    dim: int
    weight_inputs: int
    groups: int = 1
    uniform: bool = True

    @property
    def weight_outputs(self) -> int:
        return 1 - self.weight_inputs

    @property
    def num_inputs(self) -> int:
        return self.value.shape[self.dim]

    @property
    def num_outputs(self) -> int:
        return self.output.shape[self.dim]

    @property
    def is_depthwise(self) -> bool:
        """Whether each group has one input."""
        return self.groups > 1 and self.groups == self.num_inputs

    def spread(self, weight: Tensor) -> Tensor:
        """The weight, summed over its kernel, as a dense [outputs, inputs] matrix with zeros between the groups."""
        matrix = weight.flatten(2).sum(dim=2) if weight.ndim > 2 else weight
        if self.groups == 1:
            return matrix if self.weight_inputs == 1 else matrix.T
        blocks = list(matrix.chunk(self.groups, dim=0))
        diagonal: Tensor = torch.block_diag(*(blocks if self.weight_inputs == 1 else [block.T for block in blocks]))  # type: ignore[no-untyped-call]
        return diagonal

    def nonzero(self, flow: Flow) -> Tensor:
        """[outputs, inputs]: 1.0 where some weight isn't zero for good."""
        return (self.spread(flow.live(self.weight)) > 0).float()


class ContractionRule(Rule):
    """What convolutions and linear layers share; subclasses read the call's arguments."""

    def parts(self, call: Call) -> Contraction | None:
        """The call's parts; None where it isn't of a kind that can be cut."""
        raise NotImplementedError

    def relate(self, call: Call, atoms: Atoms) -> None:
        c = self.parts(call)
        if c is None:
            super().relate(call, atoms)
            return
        spatial = range(c.dim + 1, c.value.ndim) if c.weight.ndim > 2 else range(0)
        for dim in range(c.value.ndim):
            if dim in spatial:
                reason = f"{call.label} works on positions"
                atoms.fix_dim(c.value, dim, reason)
                atoms.fix_dim(c.output, dim, reason)
            elif dim != c.dim:
                atoms.same(c.value, dim, c.output, dim)
        for dim in range(2, c.weight.ndim):
            atoms.fix_dim(c.weight, dim, f"a kernel of {call.label} keeps its size")
        if c.groups == 1:
            atoms.same(c.weight, c.weight_inputs, c.value, c.dim)
            atoms.same(c.weight, c.weight_outputs, c.output, c.dim)
        elif c.is_depthwise:
            self._relate_depthwise(c, atoms)
        else:
            self._relate_grouped(c, atoms)
        if c.bias is not None:
            atoms.same(c.output, c.dim, c.bias, c.bias.ndim - 1)

    def _relate_depthwise(self, c: Contraction, atoms: Atoms) -> None:
        inputs = atoms.ids(c.value, c.dim)
        outputs = np.repeat(inputs, c.num_outputs // c.num_inputs)
        atoms.bind(c.output, c.dim, outputs)
        atoms.bind(c.weight, 0, outputs if c.weight_inputs == 1 else inputs)
        atoms.fix_dim(c.weight, 1, "a depthwise convolution keeps its outputs per input")

    def _relate_grouped(self, c: Contraction, atoms: Atoms) -> None:
        sides = (c.output, c.value) if c.weight_inputs == 1 else (c.value, c.output)
        atoms.same(c.weight, 0, sides[0], c.dim)
        atoms.bind_grouped(c.weight, atoms.ids(sides[1], c.dim))
        atoms.fix_dim(c.weight, 1, "the columns of a grouped convolution go by its channels")

    def makes(self, call: Call, atoms: Atoms) -> Ids:
        c = self.parts(call)
        return super().makes(call, atoms) if c is None or c.is_depthwise else atoms.ids(c.output, c.dim)

    def channels(self, call: Call, atoms: Atoms) -> Iterable[Channels]:
        c = self.parts(call)
        if c is None or c.groups == 1 or c.is_depthwise:
            return
        yield Channels(c.weight, atoms.ids(c.weight, 0), atoms.grouped(c.weight), c.groups, call.label)

    def work(self, call: Call, atoms: Atoms) -> Work | None:
        c = self.parts(call)
        if c is None:
            return None
        # Each weight counts once at each position of the side that its kernel steps over.
        stepped = c.output if c.weight_inputs == 1 or c.weight.ndim == 2 else c.value
        channels = stepped.shape[c.dim]
        macs = prod(stepped.shape) // channels * prod(c.weight.shape)
        outputs, inputs = atoms.ids(c.output, c.dim), atoms.ids(c.value, c.dim)
        return Work(macs, (outputs,) if c.is_depthwise else (outputs, inputs))

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        c = self.parts(call)
        if c is None:
            return super().influence(call, given, flow)
        taint = given[c.value]
        if c.weight.ndim > 2:
            others = [dim for dim in range(c.value.ndim) if dim != c.dim]
            taint = taint.mean(dim=others) @ c.nonzero(flow).T
            shape = [1] * c.output.ndim
            shape[c.dim] = -1
            taint = taint.reshape(shape)
        else:
            taint = taint @ c.nonzero(flow).T
        rest = given[c.weight].mean() + (given[c.bias].mean() if c.bias is not None else 0.0)
        return [(taint + rest).expand(c.output.shape)]

    def sinks(self, call: Call, atoms: Atoms, flow: Flow) -> Iterable[Sink]:
        c = self.parts(call)
        if c is None or c.is_depthwise:
            return
        matrix = c.spread(flow.tensors[c.weight].double()).cpu().numpy()
        rows = flow.needed_along(c.output, c.dim)
        used = (c.nonzero(flow).cpu().numpy() * rows[:, None]).any(axis=0)
        constants = flow.constants(c.value, c.dim)
        absorbed = used & constants.is_known & ~constants.is_zero
        blocked = [(used & ~constants.is_known, f"{call.label} still uses it")]
        uneven = used & constants.is_known & ~constants.is_constant
        approximate = [(uneven, f"constants that differ between positions reach {call.label}")]
        if not c.uniform:
            why = f"a constant that isn't zero reaches {call.label}, whose padding keeps a bias from absorbing it: "
            why += "let norms and biases follow the pruned layer (align_followers; in a job speedup.align)"
            approximate.append((absorbed, why))
        module = self._bias_module(call, c)
        if c.bias is None and module is None:
            blocked.append((absorbed, f"a constant reaches {call.label}, which has no bias to absorb it"))
        values = np.where(absorbed, constants.values, 0.0)
        absorption = Absorption(c.weight, c.bias, module, matrix, values, atoms.ids(c.output, c.dim))
        yield Sink(atoms.ids(c.value, c.dim), blocked, approximate, absorption)

    def _bias_module(self, call: Call, c: Contraction) -> str | None:
        """The module that may get a bias: the one that holds the weight under its usual name and makes the call."""
        path, _, name = c.weight.tensor.rpartition(".")
        return path if name == "weight" and path == call.module and c.weight.kind == "parameter" else None

    def attributes(self, call: Call, sizes: Sizes) -> Iterator[NewAttribute]:
        c = self.parts(call)
        if c is None:
            return
        inputs, outputs = sizes(c.value, c.dim), sizes(c.output, c.dim)
        for name in ("in_channels", "in_features", "nx"):
            yield NewAttribute(call.owner, name, c.num_inputs, inputs)
        for name in ("out_channels", "out_features", "nf"):
            yield NewAttribute(call.owner, name, c.num_outputs, outputs)
        if c.is_depthwise:
            yield NewAttribute(call.owner, "groups", c.groups, inputs)


class Linear(ContractionRule):
    """y = x W^T + b over the last dimension."""

    def parts(self, call: Call) -> Contraction | None:
        value, weight = call.arguments["input"], call.arguments["weight"]
        if weight.ndim != 2:
            return None
        return Contraction(value, weight, tensor_argument(call, "bias"), call.output, value.ndim - 1, 1)


class AddMM(ContractionRule):
    """y = b + x W over the last dimension of a matrix, with the weight transposed against that of a linear layer."""

    def parts(self, call: Call) -> Contraction | None:
        bias, value, weight = (call.arguments[name] for name in ("self", "mat1", "mat2"))
        scaled = call.arguments["beta"] != 1 or call.arguments["alpha"] != 1
        if scaled or bias.ndim != 1 or weight.kind == "result":
            return None
        return Contraction(value, weight, bias, call.output, 1, 0)


class Convolution(ContractionRule):
    """Convolutions of 1 to 3 dimensions, transposed ones too."""

    def __init__(self, transposed: bool = False) -> None:
        self._transposed = transposed

    def parts(self, call: Call) -> Contraction | None:
        arguments = call.arguments
        value, weight = arguments["input"], arguments["weight"]
        kernel = weight.shape[2:]
        if weight.kind == "result" and arguments["groups"] not in (1, value.shape[value.ndim - len(kernel) - 1]):
            # Groups are cut block by block from a parameter, and this weight is computed from one.
            return None
        if self._transposed:
            pointwise = set(kernel) == {1} and set(arguments["stride"]) == {1}
            uniform = pointwise and not any(arguments["padding"]) and not any(arguments["output_padding"])
        else:
            padding = arguments["padding"]
            padded = padding == "same" and set(kernel) != {1} if isinstance(padding, str) else any(padding)
            uniform = not padded
        return Contraction(
            value,
            weight,
            tensor_argument(call, "bias"),
            call.output,
            value.ndim - len(kernel) - 1,
            0 if self._transposed else 1,
            arguments["groups"],
            uniform,
        )


class MatMul(Rule):
    """The product of two matrices or batches of matrices that both may depend on the input."""

    def relate(self, call: Call, atoms: Atoms) -> None:
        left, right = call.inputs[:2]
        if left.ndim < 2 or right.ndim < 2 or len(call.inputs) != 2:
            super().relate(call, atoms)
            return
        out = call.output
        atoms.same(left, -1, right, -2)
        atoms.same(left, -2, out, -2)
        atoms.same(right, -1, out, -1)
        for value in (left, right):
            for dim in range(3, value.ndim + 1):
                if value.shape[-dim] == out.shape[-dim]:
                    atoms.same(value, -dim, out, -dim)

    def work(self, call: Call, atoms: Atoms) -> Work | None:
        left, right = call.inputs[:2]
        if left.ndim < 2 or right.ndim < 2 or len(call.inputs) != 2:
            return None
        out = call.output
        batch = tuple(atoms.ids(out, dim) for dim in range(out.ndim - 2))
        rest = atoms.ids(left, -2), atoms.ids(left, -1), atoms.ids(right, -1)
        return Work(prod(out.shape) * left.shape[-1], (*batch, *rest))

    def influence(self, call: Call, given: Mapping[Value, Tensor], flow: Flow) -> list[Tensor]:
        left, right = call.inputs[:2]
        if left.ndim < 2 or right.ndim < 2 or len(call.inputs) != 2:
            return super().influence(call, given, flow)
        return [given[left] @ flow.live(right) + flow.live(left) @ given[right]]

    def sinks(self, call: Call, atoms: Atoms, flow: Flow) -> Iterable[Sink]:
        left, right = call.inputs[:2]
        if left.ndim < 2 or right.ndim < 2 or len(call.inputs) != 2:
            return
        zero = flow.constants(left, left.ndim - 1).is_zero | flow.constants(right, right.ndim - 2).is_zero
        yield Sink(atoms.ids(left, -1), [(~zero, f"{call.label} still uses it")])


RULES.register(Linear(), "aten.linear")
RULES.register(AddMM(), "aten.addmm")
RULES.register(Convolution(), "aten.conv1d", "aten.conv2d", "aten.conv3d")
RULES.register(Convolution(transposed=True), "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
RULES.register(MatMul(), "aten.matmul", "aten.mm", "aten.bmm")
