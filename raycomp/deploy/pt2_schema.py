"""The JSON of a `torch.export` archive, as far as raycomp runs it: strict models of torch's own schema (version 8).

What a program's file says beside its nodes, signature and sizes (shape expressions, call specifications, guards) is
what torch evaluates, generates source from or unpickles; `pt2_unread` says what of it is tolerated unread.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, JsonValue, TypeAdapter

from raycomp.storage.documents import Document

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


class Name(Document):
    name: str


class Expression(Document):
    expr_str: str
    hint: JsonValue = None


class StoredSize(Document):
    """A size: a number, or an expression that only torch reads."""

    as_int: Size | None = None
    as_expr: Expression | None = None


class Device(Document):
    type: Literal["cpu", "cuda", "meta"]
    index: Size | None = None


class TensorMeta(Document):
    dtype: int
    sizes: list[StoredSize]
    requires_grad: bool
    device: Device
    strides: list[StoredSize]
    storage_offset: StoredSize
    layout: int


class SymInt(Document):
    as_name: str | None = None
    as_int: Whole | None = None


class SymFloat(Document):
    as_name: str | None = None
    as_float: Real | None = None


class SymBool(Document):
    as_name: str | None = None
    as_bool: bool | None = None


class OptionalTensor(Document):
    as_tensor: Name | None = None
    as_none: bool | None = None


class Complex(Document):
    real: Real
    imag: Real


class GraphArgument(Document):
    name: str
    graph: Graph


class Argument(Document):
    """One value: exactly one of the keys is given."""

    as_none: bool | None = None
    as_tensor: Name | None = None
    as_tensors: list[Name] | None = None
    as_int: Whole | None = None
    as_ints: list[Whole] | None = None
    as_float: Real | None = None
    as_floats: list[Real] | None = None
    as_string: str | None = None
    as_strings: list[str] | None = None
    as_sym_int: SymInt | None = None
    as_sym_ints: list[SymInt] | None = None
    as_scalar_type: int | None = None
    as_memory_format: int | None = None
    as_layout: int | None = None
    as_device: Device | None = None
    as_bool: bool | None = None
    as_bools: list[bool] | None = None
    as_sym_bool: SymBool | None = None
    as_sym_bools: list[SymBool] | None = None
    as_sym_float: SymFloat | None = None
    as_sym_floats: list[SymFloat] | None = None
    as_optional_tensors: list[OptionalTensor] | None = None
    as_optional_tensor: OptionalTensor | None = None
    as_complex: Complex | None = None
    as_int_lists: list[list[Whole]] | None = None
    as_graph: GraphArgument | None = None


class NamedArgument(Document):
    name: str
    arg: Argument
    kind: int | None = None


class Node(Document):
    target: str
    inputs: list[NamedArgument]
    outputs: list[Argument]
    metadata: dict[str, str]
    is_hop_single_tensor_return: bool | None = None
    name: str | None = None


class Graph(Document):
    inputs: list[Argument]
    outputs: list[Argument]
    nodes: list[Node]
    tensor_values: dict[str, TensorMeta]
    sym_int_values: dict[str, JsonValue]
    sym_bool_values: dict[str, JsonValue]
    is_single_tensor_return: bool = False
    custom_obj_values: dict[str, JsonValue] = Field(default_factory=dict, max_length=0)
    sym_float_values: dict[str, JsonValue] = Field(default_factory=dict)


class UserInput(Document):
    arg: Argument


class ParameterInput(Document):
    arg: Name
    parameter_name: str


class BufferInput(Document):
    arg: Name
    buffer_name: str
    persistent: bool


class ConstantInput(Document):
    arg: Name
    tensor_constant_name: str


class NumberInput(Document):
    name: str
    value: JsonValue


class InputSpec(Document):
    user_input: UserInput | None = None
    parameter: ParameterInput | None = None
    buffer: BufferInput | None = None
    tensor_constant: ConstantInput | None = None
    constant_input: NumberInput | None = None


class OutputSpec(Document):
    user_output: UserInput


class Signature(Document):
    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]


class CallSignature(Document):
    inputs: list[JsonValue]
    outputs: list[JsonValue]
    in_spec: str
    out_spec: str
    forward_arg_names: list[str] | None = None


class CallEntry(Document):
    fqn: str
    signature: CallSignature | None = None


class GraphModule(Document):
    graph: Graph
    signature: Signature
    module_call_graph: list[CallEntry]
    metadata: dict[str, str] = Field(default_factory=dict)
    treespec_namedtuple_fields: dict[str, JsonValue] = Field(default_factory=dict)


class Range(Document):
    min_val: Whole | None
    max_val: Whole | None


class Program(Document):
    graph_module: GraphModule
    opset_version: dict[str, int]
    range_constraints: dict[str, Range]
    schema_version: dict[Literal["major", "minor"], int]
    verifiers: list[str] = Field(default_factory=list)
    torch_version: str = ""
    guards_code: list[str] = Field(default_factory=list)


class Payload(Document):
    path_name: str
    is_param: bool
    use_pickle: Literal[False]
    tensor_meta: TensorMeta | None


class Payloads(Document):
    config: dict[str, Payload]


PROGRAM: TypeAdapter[Program] = TypeAdapter(Program)
PAYLOADS: TypeAdapter[Payloads] = TypeAdapter(Payloads)


def only(document: Document) -> tuple[str, Any]:
    """The one key that a union holds, and its value.

    Raises:
        ValueError: it holds several, or none.
    """
    if len(document.model_fields_set) != 1:
        raise ValueError(f"a {type(document).__name__} holds one value, not {len(document.model_fields_set)}")
    (key,) = document.model_fields_set
    return key, getattr(document, key)
