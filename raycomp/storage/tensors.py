"""Tensors and states in files that hold data alone: safetensors and JSON, nothing that is unpickled."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycomp.errors import ArtifactError, StorageError
from raycomp.storage.explain import explained

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any] | list[Any] | str | int | float | bool | None
_ODD_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: tuple[str, str] | None = None) -> None:
    """Writes tensors of any device and layout to a safetensors file, which appears once it is whole.

    Args:
        path: the file.
        tensors: by name.
        note: a key and a text that `load_metadata` gives back; one alone, since safetensors writes several in an order
            that changes from run to run.
    """
    from safetensors.torch import save_file

    # Each gets memory of its own: safetensors refuses views and tied weights.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with explained(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            save_file(plain, temporary, metadata=dict([note or ("format", "pt")]))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: the file is not a whole safetensors file.
        StorageError: it can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with explained(str(path)):
            return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"it is not a safetensors file: {error}", where=str(path)) from None


def load_metadata(path: Path) -> dict[str, str]:
    """What `save_tensors` was given beside the tensors; errors as in `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with explained(str(path)), safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ArtifactError(f"it is not a safetensors file: {error}", where=str(path)) from None


def split_state(state: object) -> tuple[dict[str, Tensor], Json]:
    """Parts a state, such as an optimizer's, into tensors by name and a JSON value that refers to them.

    Args:
        state: nested dicts (with keys of text or whole numbers), lists and tuples, of tensors, numbers, texts, booleans
            and None.

    Raises:
        StorageError: something else is in it; the error says where.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _split(state, tensors, "")


def join_state(tensors: Mapping[str, Tensor], json: Json) -> Any:
    """The inverse of `split_state`: the same types, keys and values.

    Raises:
        ArtifactError: the JSON value is not one of `split_state`, or refers to a tensor that is not there.
    """
    try:
        return _join(json, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the state does not fit its tensors: {error!r}") from None


def _split(value: object, tensors: dict[str, Tensor], path: str) -> Json:
    from torch import Tensor

    if value is None or type(value) in (str, int, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        name = path or "value"
        while name in tensors:
            name += "_"
        tensors[name] = value.detach()
        return {"tensor": name}
    if type(value) in (list, tuple):
        items = [_split(item, tensors, f"{path}.{index}".lstrip(".")) for index, item in enumerate(value)]  # type: ignore[arg-type, var-annotated]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        odd = next((key for key in value if type(key) not in (str, int)), None)
        if odd is not None:
            raise StorageError(f"a state can't be stored with the key {odd!r}", where=path or "state")
        return {
            "dict": [[key, _split(item, tensors, f"{path}.{key}".lstrip("."))] for key, item in value.items()],
        }
    raise StorageError(
        f"a state can't be stored with a {type(value).__name__} in it",
        where=path or "state",
        remedy="tensors, numbers, texts, booleans, None, and dicts, lists and tuples of these",
    )


def _join(value: Json, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return _ODD_FLOATS[content]
    if kind == "tuple":
        return tuple(_join(item, tensors) for item in content)
    if kind == "dict":
        return {key: _join(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind '{kind}'")
