"""The JSON of a `torch.export` archive, as far as raycomp runs it: strict models of torch's own schema (version 8).

What a program's file says beside its nodes, signature and sizes (shape expressions, call specifications, guards) is
what torch evaluates, generates source from or unpickles; `pt2_unread` says what of it is tolerated unread.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, JsonValue, TypeAdapter
from pydantic_core import core_schema

from raycomp.storage.documents import Many, ManyNamed, record

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
LAYOUTS = {7: torch.strided}
MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
NUMBERED: dict[str, dict[int, Any]] = {
    "as_scalar_type": DTYPES,
    "as_layout": LAYOUTS,
    "as_memory_format": MEMORY_FORMATS,
}

Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_ODD_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _real(value: Any) -> Any:
    return _ODD_NUMBERS.get(value, value) if isinstance(value, str) else value


Real = Annotated[float, BeforeValidator(_real)]
Size = Annotated[int, Field(ge=0, lt=2**48)]


@record
class Name:
    name: str


@record
class Expression:
    expr_str: str
    hint: JsonValue = None


@record
class StoredSize:
    """A size: a number, or an expression that only torch reads."""

    as_int: Size | None = None
    as_expr: Expression | None = None


@record
class Device:
    type: Literal["cpu", "cuda", "meta"]
    index: Size | None = None


@record
class TensorMeta:
    dtype: int
    sizes: Many[StoredSize]
    requires_grad: bool
    device: Device
    strides: Many[StoredSize]
    storage_offset: StoredSize
    layout: int


@record
class SymInt:
    as_name: str | None = None
    as_int: Whole | None = None


@record
class SymFloat:
    as_name: str | None = None
    as_float: Real | None = None


@record
class SymBool:
    as_name: str | None = None
    as_bool: bool | None = None


@record
class OptionalTensor:
    as_tensor: Name | None = None
    as_none: bool | None = None


@record
class Complex:
    real: Real
    imag: Real


@record
class GraphArgument:
    name: str
    graph: Graph


@record
class _Argument:
    """One value: exactly one of the keys is given."""

    as_none: bool | None = None
    as_tensor: Name | None = None
    as_tensors: Many[Name] | None = None
    as_int: Whole | None = None
    as_ints: Many[Whole] | None = None
    as_float: Real | None = None
    as_floats: Many[Real] | None = None
    as_string: str | None = None
    as_strings: Many[str] | None = None
    as_sym_int: SymInt | None = None
    as_sym_ints: Many[SymInt] | None = None
    as_scalar_type: int | None = None
    as_memory_format: int | None = None
    as_layout: int | None = None
    as_device: Device | None = None
    as_bool: bool | None = None
    as_bools: Many[bool] | None = None
    as_sym_bool: SymBool | None = None
    as_sym_bools: Many[SymBool] | None = None
    as_sym_float: SymFloat | None = None
    as_sym_floats: Many[SymFloat] | None = None
    as_optional_tensors: Many[OptionalTensor] | None = None
    as_optional_tensor: OptionalTensor | None = None
    as_complex: Complex | None = None
    as_int_lists: Many[Many[Whole]] | None = None
    as_graph: GraphArgument | None = None


class Argument(NamedTuple):
    """What an argument is, and its value.

    Kept without all that it could be, in a quarter of the memory: a hundred layers have ten thousand of them.
    """

    kind: str
    value: Any

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda given: cls(*only(given)), handler.generate_schema(_Argument)
        )


@record
class NamedArgument:
    name: str
    arg: Argument
    kind: int | None = None


@record
class Node:
    target: str
    inputs: Many[NamedArgument]
    outputs: Many[Argument]
    metadata: ManyNamed[str]
    is_hop_single_tensor_return: bool | None = None
    name: str | None = None


@record
class Graph:
    inputs: Many[Argument]
    outputs: Many[Argument]
    nodes: Many[Node]
    tensor_values: ManyNamed[TensorMeta]
    sym_int_values: ManyNamed[JsonValue]
    sym_bool_values: ManyNamed[JsonValue]
    is_single_tensor_return: bool = False
    custom_obj_values: ManyNamed[JsonValue] = Field(default_factory=dict, max_length=0)
    sym_float_values: ManyNamed[JsonValue] = Field(default_factory=dict)


@record
class UserInput:
    arg: Argument


@record
class ParameterInput:
    arg: Name
    parameter_name: str


@record
class BufferInput:
    arg: Name
    buffer_name: str
    persistent: bool


@record
class ConstantInput:
    arg: Name
    tensor_constant_name: str


@record
class NumberInput:
    name: str
    value: JsonValue


@record
class InputSpec:
    user_input: UserInput | None = None
    parameter: ParameterInput | None = None
    buffer: BufferInput | None = None
    tensor_constant: ConstantInput | None = None
    constant_input: NumberInput | None = None


@record
class OutputSpec:
    user_output: UserInput


@record
class Signature:
    input_specs: Many[InputSpec]
    output_specs: Many[OutputSpec]


@record
class CallSignature:
    inputs: Many[JsonValue]
    outputs: Many[JsonValue]
    in_spec: str
    out_spec: str
    forward_arg_names: Many[str] | None = None


@record
class CallEntry:
    fqn: str
    signature: CallSignature | None = None


@record
class GraphModule:
    graph: Graph
    signature: Signature
    module_call_graph: Many[CallEntry]
    metadata: ManyNamed[str] = Field(default_factory=dict)
    treespec_namedtuple_fields: ManyNamed[JsonValue] = Field(default_factory=dict)


@record
class Range:
    min_val: Whole | None
    max_val: Whole | None


@record
class Program:
    graph_module: GraphModule
    opset_version: ManyNamed[int]
    range_constraints: ManyNamed[Range]
    schema_version: dict[Literal["major", "minor"], int]
    verifiers: Many[str] = Field(default_factory=list)
    torch_version: str = ""
    guards_code: Many[str] = Field(default_factory=list)


@record
class Payload:
    path_name: str
    is_param: bool
    use_pickle: Literal[False]
    tensor_meta: TensorMeta | None


@record
class Payloads:
    config: ManyNamed[Payload]


PROGRAM: TypeAdapter[Program] = TypeAdapter(Program)
PAYLOADS: TypeAdapter[Payloads] = TypeAdapter(Payloads)


def only(union: Any) -> tuple[str, Any]:
    """The one key that a union holds, and its value.

    Raises:
        ValueError: it holds several, or none.
    """
    given = [(key, value) for key in union.__slots__ if (value := getattr(union, key)) is not None]
    if len(given) != 1:
        raise ValueError(f"a {type(union).__name__.strip('_')} holds one value, not {len(given)}")
    return given[0]
