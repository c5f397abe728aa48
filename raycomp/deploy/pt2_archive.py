"""What a `torch.export` archive may hold before raycomp opens it.

`torch.export.load` unpickles sample inputs, flagged weights and legacy files, loads native code, resolves operator
names anywhere below `torch`, and evaluates shape expressions as Python. An archive passes here only if it gives none of
this a chance: every file, payload, operator, expression, type and name is checked against what is allowed.
"""

from __future__ import annotations

import json
import re
from typing import Any

from torch.export.pt2_archive._package import PT2ArchiveReader

from raycomp.errors import SpeedupError

_CONFIGS = {
    "data/weights/model_weights_config.json": re.compile(r"weight_\d+"),
    "data/constants/model_constants_config.json": re.compile(r"tensor_\d+"),
}
_PROGRAM = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_FILES = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|\.data/\w+"
    r"|extra/[\w.]+"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(?:aten|prims|torchvision)\.(?!from_file\b|save\b|_print\b)\w+(?:\.\w+)?"
    r"|torch\.ops\.higher_order\.(?:wrap_with_set_grad_enabled|wrap_with_autocast|cond)"
    r"|_operator\.(?:add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|invert|getitem)"
    r"|math\.(?:ceil|floor|trunc|sqrt|log|log2|exp|pow)"
    r"|torch\.sym_(?:int|float|max|min|ite|not|sqrt|sum)"
)
_PLAIN_TEXT = re.compile(r"[\w .,:;/<>\[\]*+|-]*")
_EXPRESSION = re.compile(r"[\s+\-*/%(),<>=!&|~]|\d+(?:\.\d+)?|'[suz]+\d+'|[A-Za-z_]\w*")
_SYMBOL = re.compile(
    r"[suz]+\d+|Symbol|Integer|Float|Rational|positive|nonnegative|integer|precision|dps|true|false|True|False"
    r"|Add|Mul|Pow|Max|Min|Mod|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Equality|Unequality|StrictLessThan|LessThan"
    r"|StrictGreaterThan|GreaterThan|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|FloatTrueDiv|ModularIndexing|Where"
    r"|CeilToInt|FloorToInt|TruncToInt|TruncToFloat|RoundToInt|ToFloat|PowByNatural|FloatPow|LShift|RShift|Identity"
    r"|int_oo|oo"
)
_TYPES = re.compile(r"builtins\.(?:tuple|list|dict)|collections\.(?:OrderedDict|namedtuple)|transformers\.[\w.]+")
_METADATA = ("nn_module_stack", "torch_fn")


def check_archive(reader: PT2ArchiveReader, where: str) -> None:
    """Passes an archive that holds one exported program, raw tensors and nothing that could run.

    Args:
        reader: torch's own reader, so that check and load cannot see different files.
        where: the file's name, for the error.

    Raises:
        SpeedupError: the archive holds anything else; the message says what.
    """
    names = reader.get_file_names()
    known = {*_CONFIGS, _PROGRAM, _SAMPLE_INPUTS}
    for name in names:
        if name not in known and not _FILES.fullmatch(name):
            raise _refused(f"the file {name!r}", where)
    missing = sorted(known - set(names))
    if missing:
        raise _refused(f"no {missing[0]}", where)
    if reader.read_bytes(_SAMPLE_INPUTS):
        raise _refused(f"pickled sample inputs ({_SAMPLE_INPUTS})", where)
    for name, allowed in _CONFIGS.items():
        _check_payloads(_json(reader, name, where), allowed, where)
    _check(_json(reader, _PROGRAM, where), where)


def _json(reader: PT2ArchiveReader, name: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(reader.read_string(name))
    except ValueError:
        raise _refused(f"a {name} that is not JSON", where) from None
    if not isinstance(content, dict):
        raise _refused(f"a {name} that is not an object", where)
    return content


def _check_payloads(config: dict[str, Any], allowed: re.Pattern[str], where: str) -> None:
    for name, payload in config.get("config", {}).items():
        if payload.get("use_pickle") is not False:
            raise _refused(f"the pickled tensor {name!r}", where)
        if not allowed.fullmatch(str(payload.get("path_name"))):
            raise _refused(f"{name!r} in {payload.get('path_name')!r}", where)


def _check(value: Any, where: str) -> None:
    """Checks every string of the program's JSON by the key that it stands under."""
    if isinstance(value, list):
        for item in value:
            _check(item, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _require(_PLAIN_TEXT, key, "the name", where)
            _check_item(key, item, where)
    elif isinstance(value, str):
        _require(_PLAIN_TEXT, value, "the text", where)


def _check_item(key: str, item: Any, where: str) -> None:
    if key == "target" and isinstance(item, str):
        _require(_OPERATOR, item, "the operator", where)
    elif key == "expr_str":
        _check_expression(str(item), where)
    elif key == "range_constraints":
        for symbol in item:
            _check_expression(symbol, where)
    elif key in ("in_spec", "out_spec"):
        _check_types(json.loads(item)[1], where)
    elif key == "metadata":
        for name in item:
            if name not in _METADATA:
                raise _refused(f"the metadata {name!r}", where)
    elif key == "guards_code":
        return  # compiled only by `ExportedProgram.module(check_guards=True)`, which load_pt2 does not ask for
    else:
        _check(item, where)


def _check_expression(text: str, where: str) -> None:
    if _EXPRESSION.sub("", text):
        raise _refused(f"the expression {text[:80]!r}", where)
    for symbol in re.findall(r"[A-Za-z_]\w*", text):
        _require(_SYMBOL, symbol, "in an expression the name", where)


def _check_types(spec: dict[str, Any], where: str) -> None:
    if spec["type"] is not None:
        _require(_TYPES, spec["type"], "the type", where)
        if "__enum__" in json.dumps(spec["context"]):
            raise _refused("an enumeration in its signature", where)
    for child in spec["children_spec"]:
        _check_types(child, where)


def _require(pattern: re.Pattern[str], text: str, what: str, where: str) -> None:
    if not pattern.fullmatch(text):
        raise _refused(f"{what} {text[:80]!r}", where)


def _refused(what: str, where: str) -> SpeedupError:
    return SpeedupError(
        f"refused to load this archive: it holds {what}" if not what.startswith("no ") else f"this archive has {what}",
        where=where,
        remedy="raycomp opens archives that it wrote itself (export_pt2), which hold no pickle and no code",
    )
