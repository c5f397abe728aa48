"""The operators that a stored graph may call: known to compute tensors and numbers, and to do nothing else.

A list, because neither a namespace nor a schema tells: `aten.from_file` makes files, `aten.set_` points a tensor at
foreign memory, and a library's operators do whatever their author wrote. Plans and exported programs share it.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce, wraps
from typing import Any

import torch
from torch import Tensor

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Outputs

_PURE = frozenset(
    """
    abs acos acosh add addbmm addcdiv addcmul addmm addmv addr adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d alias all alpha_dropout amax
    amin aminmax angle any arange arccos arcsin arctan arctan2 argmax argmin argsort asin asinh atan atan2 atanh
    atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli bilinear
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor block_diag bmm
    broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu chain_matmul channel_shuffle
    chunk clamp clamp_max clamp_min clip clone column_stack complex concat concatenate conj conj_physical
    constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution copy copysign cos cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum
    deg2rad detach diag diag_embed diagonal diff digamma dist div divide dot dropout dsplit dstack einsum elu
    embedding empty empty_like eq equal erf erfc erfinv exp exp2 expand expand_as expm1 eye
    fake_quantize_per_channel_affine fake_quantize_per_tensor_affine feature_alpha_dropout feature_dropout
    fft_fft fft_fft2 fft_fftn fft_fftfreq fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft
    fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill flatten flip fliplr flipud float_power
    floor floor_divide fmax fmin fmod frac full full_like gather ge gelu glu greater greater_equal grid_sampler
    group_norm gru gt hardshrink hardsigmoid hardswish hardtanh heaviside hsplit hstack huber_loss hypot im2col
    col2im imag index index_add index_copy index_fill index_put index_select inner instance_norm isclose
    isfinite isinf isnan isneginf isposinf isreal item kron kthvalue l1_loss layer_norm le leaky_relu lerp less
    less_equal lift_fresh lift_fresh_copy linalg_cross linalg_matrix_norm linalg_multi_dot linalg_norm
    linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2
    logcumsumexp logical_and logical_not logical_or logical_xor logit logspace logsumexp lstm lt masked_fill
    masked_scatter masked_select matmul matrix_H mH mT adjoint max max_pool1d max_pool2d max_pool3d maximum mean
    median meshgrid min minimum mish mm mode moveaxis movedim mse_loss mul multinomial multiply mv nan_to_num
    nanmean nanmedian nansum narrow native_channel_shuffle native_dropout ne neg negative new_empty new_full
    new_ones new_zeros nll_loss nll_loss_nd cross_entropy_loss nonzero norm normal normal_functional not_equal
    one_hot ones ones_like outer pad pairwise_distance permute pixel_shuffle pixel_unshuffle polar positive pow
    prelu _prelu_kernel prod quantile rad2deg rand rand_like randint randint_like randn randn_like randperm
    ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj
    resolve_neg rms_norm rnn_relu rnn_tanh roll rot90 round rrelu rsqrt rsub scalar_tensor
    scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn
    sigmoid sign signbit silu sin sinc sinh slice slice_scatter smooth_l1_loss softmax softplus softshrink sort
    split split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum sum_to_size swapaxes swapdims
    t take take_along_dim tan tanh tensor_split tensordot threshold tile to topk trace transpose
    triangular_solve tril tril_indices triu triu_indices true_divide trunc type_as unbind unflatten unfold
    unique_consecutive unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_trilinear3d var var_mean
    vdot view view_as view_as_complex view_as_real view_copy vsplit vstack where xlogy zero zeros zeros_like
    _assert_async _assert_scalar _assert_tensor_metadata _cast_Float _log_softmax _local_scalar_dense
    _reshape_alias _softmax _to_copy _unsafe_view _weight_norm _shape_as_tensor sym_constrain_range
    sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride
    """.split()  # noqa: SIM905
)
"""Names in `aten`; their in-place forms (`relu_`) are meant, too, and forms that write to a given `out` are not."""
_BIGGEST = 2**63
_MOST_POWER = 64
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _on_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Python that takes only numbers and tensors, and whose whole numbers stay in 64 bits."""

    @wraps(function)
    def call(*values: Any) -> Any:
        for value in values:
            if not isinstance(value, (*_NUMBERS, Tensor)):
                raise TypeError(f"{function.__name__} of a {type(value).__name__}")
        if function is operator.pow and isinstance(values[1], int) and abs(values[1]) > _MOST_POWER:
            raise ValueError(f"a power of {values[1]}")
        result = function(*values)
        if isinstance(result, int) and not -_BIGGEST <= result < _BIGGEST:
            raise ValueError(f"{function.__name__} gives a number of more than 64 bits")
        return result

    return call


def _getitem(container: Any, key: Any) -> Any:
    if not isinstance(container, (tuple, list, dict, Tensor)) or not isinstance(key, (int, str, torch.SymInt)):
        raise TypeError(f"an item of a {type(container).__name__}")
    found: Any = container[key]  # type: ignore[index]
    return found


def _sum(terms: Any) -> Any:
    return reduce(_on_numbers(operator.add), terms, 0)


def _device_of(tensor: Tensor) -> torch.device:
    return tensor.device


def _with_grad(enabled: bool, block: Callable[..., Any], *args: Any) -> Any:
    with torch.set_grad_enabled(enabled):
        return block(*args)


def _with_autocast(device: str, dtype: Any, enabled: bool, cached: bool | None, block: Any, *args: Any) -> Any:
    with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached):
        return block(*args)


def _cond(condition: Any, block: Any, other: Any, args: Any = ()) -> Any:
    return block(*args) if condition else other(*args)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": _on_numbers(getattr(operator, name))
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt", "le"),
            *("gt", "ge", "and_", "or_", "xor", "not_", "invert"),
        )
    },
    **{
        f"math.{name}": _on_numbers(getattr(math, name))
        for name in ("ceil", "floor", "trunc", "sqrt", "log", "log2", "exp", "pow")
    },
    **{
        f"torch.sym_{name}": _on_numbers(getattr(torch, f"sym_{name}"))
        for name in ("int", "float", "max", "min", "ite", "not", "sqrt")
    },
    "torch.sym_sum": _sum,
    "operator.getitem": _getitem,
    "raycomp.device": _device_of,
    "raycomp.with_grad": _with_grad,
    "raycomp.with_autocast": _with_autocast,
    "raycomp.cond": _cond,
    "raycomp.outputs": Outputs,
}
"""What a graph may call beside operators: arithmetic on sizes, items of results, and raycomp's own."""


def is_identifier(name: str) -> bool:
    """Whether a name could stand in source as a plain variable: no keyword, none of Python's own `__names__`."""
    return bool(_IDENTIFIER.fullmatch(name)) and not keyword.iskeyword(name) and not name.startswith("__")


@cache
def pure_operator(name: str) -> torch._ops.OpOverload:
    """The operator of a name such as `aten.add.Tensor`.

    Raises:
        SpeedupError: it isn't one that is known to compute, and nothing else.
    """
    found = re.fullmatch(r"aten\.([A-Za-z0-9_]+)(?:\.([A-Za-z0-9_]+))?", name)
    if found is not None:
        packet, overload = found[1], found[2] or "default"
        plain = packet.removesuffix("_")
        known = packet if packet in _PURE else plain if plain in _PURE else None
        overloads = getattr(torch.ops.aten, packet).overloads() if known and hasattr(torch.ops.aten, packet) else ()
        if overload in overloads:
            operator_: torch._ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload)
            if operator_._schema.is_mutable == (known == plain != packet) and _is_of_tensors(operator_):
                return operator_
    raise SpeedupError(
        f"{name[:80]!r} is none of the operators that a stored graph may call",
        remedy="only operators that compute, and do nothing else, are loaded",
    )


def _is_of_tensors(operator_: torch._ops.OpOverload) -> bool:
    """Whether it takes or gives tensors and writes to none that is given as `out`; others work on texts and lists."""
    schema = operator_._schema
    kinds = [str(value.type) for value in (*schema.arguments, *schema.returns)]
    on_tensors = any("Tensor" in kind for kind in kinds) or schema.name == "aten::_assert_scalar"
    return on_tensors and not any(argument.is_out for argument in schema.arguments)


def check_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Whether an operator can be called with so many arguments of these names.

    Raises:
        SpeedupError: it can't.
    """
    if not isinstance(function, torch._ops.OpOverload):
        return
    arguments = function._schema.arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    given = [*positional[: len(args)], *kwargs]
    missing = [a.name for a in arguments if not a.has_default_value() and a.name not in given]
    odd = [name for name in kwargs if name not in (a.name for a in arguments)]
    if missing or odd or len(args) > len(positional) or len(set(given)) != len(given):
        raise SpeedupError(f"{function} is called with {len(args)} arguments and {', '.join(kwargs) or 'no names'}")


def named_function(name: str) -> Callable[..., Any]:
    """The operator, or the function beside operators, of a name.

    Raises:
        SpeedupError: a stored graph may not call it.
    """
    return FUNCTIONS[name] if name in FUNCTIONS else pure_operator(name)


def name_of_function(function: Any) -> str | None:
    """The name by which `named_function` finds it, or None where it doesn't."""
    for name, known in FUNCTIONS.items():
        if function is known or function is getattr(known, "__wrapped__", None):
            return name
    if function is operator.getitem:
        return "operator.getitem"
    try:
        return str(function) if pure_operator(str(function)) is function else None
    except SpeedupError:
        return None
