"""What a program's file says to torch alone: shape expressions, call specifications, names in source.

raycomp reads none of it. Whoever gives an exported archive to `torch.export.load`, though, has it evaluated and written
into generated source, so that an archive passes only where every such text is plain.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any

from pydantic import JsonValue, TypeAdapter

from raycomp.deploy.pt2_archive import refused
from raycomp.deploy.pt2_schema import Graph, Program, StoredSize
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.operators import is_identifier
from raycomp.storage.documents import Document, parse_document

_PLAIN_TEXT = re.compile(r"[\w .,:;/<>\[\]*+|-]*")
_EXPRESSION = re.compile(r"[\s+\-*/%(),<>=!&|~]|\d+(?:\.\d+)?|'[suz]+\d+'|[A-Za-z_]\w*")
_SYMBOL = re.compile(
    r"[suz]+\d+|Symbol|Integer|Float|Rational|positive|nonnegative|integer|precision|dps|true|false|True|False"
    r"|Add|Mul|Pow|Max|Min|Mod|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Equality|Unequality|StrictLessThan|LessThan"
    r"|StrictGreaterThan|GreaterThan|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|FloatTrueDiv|ModularIndexing|Where"
    r"|CeilToInt|FloorToInt|TruncToInt|TruncToFloat|RoundToInt|ToFloat|LShift|RShift|Identity"
    r"|int_oo|oo"
)
_SQUARES = re.compile(r"Pow\(Symbol\([^()]*\), Integer\(\d\)\)")
_LONGEST, _DEEPEST = 4000, 40
_TYPES = re.compile(r"builtins\.(?:tuple|list|dict)|collections\.(?:OrderedDict|namedtuple)|transformers\.[\w.]+")
_METADATA = ("nn_module_stack", "torch_fn")


class _Spec(Document):
    type: str | None
    context: JsonValue
    children_spec: list[_Spec]


_CONTEXT: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)
_SPEC: TypeAdapter[tuple[int, _Spec]] = TypeAdapter(tuple[int, _Spec])


def check_unread(program: Program, where: str) -> None:
    """Passes a program whose unread texts are plain.

    Raises:
        SpeedupError: one of them is not; the message says which.
    """
    _check_graph(program.graph_module.graph, where)
    for spec in program.graph_module.signature.input_specs:
        _path(spec.parameter.parameter_name if spec.parameter else "", where)
        _path(spec.buffer.buffer_name if spec.buffer else "", where)
        _path(spec.tensor_constant.tensor_constant_name if spec.tensor_constant else "", where)
    for symbol in program.range_constraints:
        _check_expression(symbol, where)
    for text in [*program.verifiers, program.torch_version, *program.opset_version]:
        _plain(text, "the text", where)
    for entry in program.graph_module.module_call_graph:
        _plain(entry.fqn, "the text", where)
        if entry.signature is not None:
            for name in entry.signature.forward_arg_names or ():
                _name(name, "the argument", where)
            _check_spec(entry.signature.in_spec, where)
            _check_spec(entry.signature.out_spec, where)
            _check_texts([entry.signature.inputs, entry.signature.outputs], where)
    module = program.graph_module
    _check_texts([module.metadata, module.treespec_namedtuple_fields], where)


def _check_graph(graph: Graph, where: str) -> None:
    for name, meta in graph.tensor_values.items():
        _name(name, "the text", where)
        for size in (*meta.sizes, *meta.strides, meta.storage_offset):
            _check_size(size, where)
    for values in (graph.sym_int_values, graph.sym_bool_values, graph.sym_float_values):
        _check_texts(values, where)
    for node in graph.nodes:
        for key, text in node.metadata.items():
            if key not in _METADATA:
                raise refused(f"the metadata {key!r}", where)
            if not text.isprintable():
                raise refused(f"the text {text[:80]!r}", where)
        for item in node.inputs:
            if item.arg.kind == "as_graph":
                _check_graph(item.arg.value.graph, where)


def _check_size(size: StoredSize, where: str) -> None:
    if size.as_expr is not None:
        _check_expression(size.as_expr.expr_str, where)
        _check_texts(size.as_expr.hint, where)


def _check_texts(value: Any, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check_texts(item, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _plain(key, "the name", where)
            if key == "expr_str":
                _check_expression(str(item), where)
            else:
                _check_texts(item, where)
    elif isinstance(value, str):
        _plain(value, "the text", where)


def _check_expression(text: str, where: str) -> None:
    """No text that grows when it is evaluated: powers are small ones of a symbol, numbers those of 64 bits."""
    text = _SQUARES.sub("", text[: _LONGEST + 1])
    depth = max(accumulate({"(": 1, ")": -1}.get(character, 0) for character in text), default=0)
    long_number = any(len(number) > 19 for number in re.findall(r"\d+", text))
    if len(text) > _LONGEST or depth > _DEEPEST or long_number or "**" in text or "Pow" in text or "<<" in text:
        raise refused(f"the expression {text[:80]!r}", where)
    if _EXPRESSION.sub("", text):
        raise refused(f"the expression {text[:80]!r}", where)
    for symbol in re.findall(r"[A-Za-z_]\w*", text):
        if not _SYMBOL.fullmatch(symbol):
            raise refused(f"in an expression the name {symbol[:80]!r}", where)


def _check_spec(text: str, where: str) -> None:
    _, spec = parse_document(_SPEC, text, "the specification of a call", where, SpeedupError)
    todo = [spec]
    while todo:
        each = todo.pop()
        if each.type is not None and not _TYPES.fullmatch(each.type):
            raise refused(f"the type {each.type[:80]!r}", where)
        context = each.context
        if isinstance(context, str):
            context = parse_document(_CONTEXT, context, "a specification's context", where, SpeedupError)
        if "__enum__" in json.dumps(context):
            raise refused("an enumeration in its signature", where)
        _check_context(context, where)
        todo += each.children_spec


def _check_context(value: Any, where: str) -> None:
    """Keys and fields, which torch writes into source as they are."""
    if isinstance(value, (list, dict)):
        for item in value:
            _check_context(item, where)
    if isinstance(value, dict):
        _check_context(list(value.values()), where)
    if isinstance(value, str) and not all(map(is_identifier, value.split("."))):
        raise refused(f"the key {value[:80]!r}", where)


def _name(text: str, what: str, where: str) -> None:
    if not is_identifier(text):
        raise refused(f"{what} {text[:80]!r}", where)


def _path(text: str, where: str) -> None:
    """The name of a parameter or buffer: whatever a module may be called, as long as it stays a text within quotes."""
    if not text.isprintable() or any(mark in text for mark in "\"'\\`{}"):
        raise refused(f"the tensor {text[:80]!r}", where)


def _plain(text: str, what: str, where: str) -> None:
    if not _PLAIN_TEXT.fullmatch(text):
        raise refused(f"{what} {text[:80]!r}", where)
