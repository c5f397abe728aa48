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
    abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv addr adjoint
    affine_grid_generator alias all alpha_dropout amax amin aminmax __and__ angle any arange arccos arcsin
    arctan arctan2 argmax argmin argsort argwhere asin asinh _assert_async _assert_scalar
    _assert_tensor_metadata atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d
    baddbmm bartlett_window batch_norm bernoulli bilinear binary_cross_entropy binary_cross_entropy_with_logits
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor blackman_window
    block_diag bmm broadcast_tensors broadcast_to bucketize cartesian_prod _cast_Float cat cdist ceil celu
    chain_matmul channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im column_stack complex concat
    concatenate conj conj_physical constant_pad_nd contiguous conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d conv_transpose3d convolution copy copysign cos cosh cosine_similarity count_nonzero cov
    cross cross_entropy_loss cummax cummin cumprod cumsum deg2rad detach diag diag_embed diagonal diff digamma
    dist div divide dot dropout dsplit dstack einsum elu embedding embedding_bag embedding_renorm empty
    empty_like eq equal erf erfc erfinv exp exp2 expand expand_as expm1 exponential eye
    fake_quantize_per_channel_affine fake_quantize_per_tensor_affine feature_alpha_dropout feature_dropout
    fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft
    fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill flatten flip fliplr flipud float_power
    floor floor_divide fmax fmin fmod frac full full_like gather ge gelu glu greater greater_equal grid_sampler
    group_norm gru gru_cell gt hamming_window hann_window hardshrink hardsigmoid hardswish hardtanh heaviside
    hsplit hstack huber_loss hypot __iand__ im2col imag index index_add index_copy index_fill index_put
    index_select inner instance_norm inverse __ior__ is_nonzero isclose isfinite isin isinf isnan isneginf
    isposinf isreal istft item __ixor__ kl_div kron kthvalue l1_loss layer_norm le leaky_relu lerp less
    less_equal lgamma lift_fresh lift_fresh_copy linalg_cholesky linalg_cross linalg_det linalg_inv
    linalg_matrix_norm linalg_multi_dot linalg_norm linalg_solve linalg_vector_norm linear linspace
    _local_scalar_dense log log10 log1p log2 log_sigmoid _log_softmax log_softmax logaddexp logaddexp2
    logcumsumexp logical_and logical_not logical_or logical_xor logit logspace logsumexp __lshift__ lstm
    lstm_cell lt masked_fill masked_scatter masked_select matmul matrix_exp matrix_H max max_pool1d max_pool2d
    max_pool3d max_unpool2d maximum mean median meshgrid mH min minimum mish mm mode moveaxis movedim mse_loss
    mT mul multinomial multiply mv nan_to_num nanmean nanmedian nansum narrow native_channel_shuffle
    native_dropout ne neg negative new_empty new_full new_ones new_zeros nll_loss nll_loss2d nll_loss_nd nonzero
    nonzero_static norm normal normal_functional not_equal numpy_T one_hot ones ones_like __or__ outer pad
    pairwise_distance permute pixel_shuffle pixel_unshuffle polar positive pow prelu _prelu_kernel prod quantile
    rad2deg rand rand_like randint randint_like randn randn_like randperm ravel real reciprocal reflection_pad1d
    reflection_pad2d reflection_pad3d relu relu6 remainder repeat repeat_interleave replication_pad1d
    replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm
    rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90 round rrelu __rshift__ rsqrt rsub scalar_tensor
    scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn
    _shape_as_tensor sigmoid sign signbit silu sin sinc sinh slice slice_scatter smooth_l1_loss soft_margin_loss
    _softmax softmax softplus softshrink sort special_entr special_erf special_expit special_gammaln
    special_log1p special_log_softmax special_logit special_logsumexp special_softmax special_xlogy split
    split_with_sizes sqrt square squeeze stack std std_mean stft sub subtract sum sum_to_size swapaxes swapdims
    sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride t take
    take_along_dim tan tanh tensor_split tensordot threshold tile to _to_copy topk trace transpose
    triangular_solve tril tril_indices triu triu_indices true_divide trunc type_as unbind unflatten unfold
    uniform _unique2 unique_consecutive unique_dim _unsafe_view unsqueeze upsample_bicubic2d
    _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_trilinear3d var var_mean vdot view view_as view_as_complex view_as_real
    view_copy vsplit vstack _weight_norm where xlogy __xor__ zero zeros zeros_like
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_unpool3d
    fractional_max_pool2d fractional_max_pool3d det trapezoid linalg_eigvalsh linalg_matmul linalg_qr
    linalg_svdvals special_erfcx
    """.split()  # noqa: SIM905
)
"""Names in `aten`; their in-place forms (`relu_`) are meant, too, and forms that write to a given `out` are not."""
_CONSTANTS = {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format}
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


_UNSET = ("aten::empty", "aten::empty_like", "aten::new_empty")


def as_run(function: Any) -> Callable[..., Any]:
    """What runs in a function's place: an operator's result that would hold what this process had there is zeros."""
    if not isinstance(function, torch._ops.OpOverload) or function._schema.name not in _UNSET:
        return function  # type: ignore[no-any-return]
    return lambda *args, **kwargs: function(*args, **kwargs).zero_()


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
            in_place = packet.startswith("__i") or known == plain != packet
            if operator_._schema.is_mutable == in_place and _is_of_tensors(operator_):
                return operator_
    raise SpeedupError(
        f"{name[:80]!r} is none of the operators that a stored graph may call",
        remedy="only operators that compute, and do nothing else, are loaded",
    )


def _is_of_tensors(operator_: torch._ops.OpOverload) -> bool:
    """Whether it takes or gives tensors and writes to none that is given as `out`; others work on texts and lists.

    Packed sequences are read by lengths that are trusted, and a data type that is any number points anywhere.
    """
    schema = operator_._schema
    kinds = [str(value.type) for value in (*schema.arguments, *schema.returns)]
    on_tensors = any("Tensor" in kind for kind in kinds) or schema.name == "aten::_assert_scalar"
    odd = any(
        argument.is_out or argument.name == "batch_sizes" or (argument.name == "dtype" and not _constants(argument))
        for argument in schema.arguments
    )
    return on_tensors and not odd


def _constants(argument: torch.Argument) -> type | None:
    """Of which constants an argument is; torch takes numbers for them, with which it looks up a table unchecked."""
    return _CONSTANTS.get(str(argument.real_type).removeprefix("Optional[").removesuffix("]"))


def check_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Whether an operator can be called with so many arguments of these names; data types and layouts are such.

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
    named = {**dict(zip(positional, args, strict=False)), **kwargs}
    for argument in arguments:
        kind, value = _constants(argument), named.get(argument.name)
        if kind is not None and value is not None and not isinstance(value, kind):
            raise SpeedupError(f"{function} is called with a {argument.name} that is no {kind.__name__}")


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
