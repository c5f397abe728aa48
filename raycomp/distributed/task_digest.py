"""What tells a task that Python gave from others: by it a run is found again."""

from __future__ import annotations

import hashlib
import io
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import torch
from ray import cloudpickle
from torch import Tensor

from raycomp.distributed.culprit import nonlocals_of
from raycomp.pipeline.task import Task


def digest(task: Task) -> str | None:
    """The sha256, in hex, of what a task holds: the same in every process that made it alike.

    Code stands in it by its name, as a job names its task; lambdas and closures, whose name doesn't tell them apart, by
    what they do and hold; tensors by their numbers. None where something in it can't be pickled.
    """
    try:
        return _sha256(vars(task))
    except Exception:
        return None


def _sha256(value: object) -> str:
    file = io.BytesIO()
    _Naming(file).dump(value)
    return hashlib.sha256(file.getvalue()).hexdigest()


class _Naming(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes for each value what it is known by."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._met: dict[int, int] = {}

    def persistent_id(self, value: object) -> object:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type | BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, set | frozenset):
            return type(value).__name__, sorted(map(_sha256, value))
        return _numbers(value) if isinstance(value, Tensor) else None

    def _function(self, function: FunctionType) -> object:
        name = f"{function.__module__}.{function.__qualname__}"
        if "<" not in name:
            return name
        if id(function) in self._met:
            return name, self._met[id(function)]
        self._met[id(function)] = len(self._met)
        return name, _body(function.__code__), function.__defaults__, function.__kwdefaults__, nonlocals_of(function)


def _body(code: CodeType) -> tuple[object, ...]:
    """What a function does, wherever it was written."""
    constants = tuple(_body(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.co_code, code.co_names, constants


def _numbers(tensor: Tensor) -> tuple[object, ...] | None:
    """None for a tensor whose numbers don't lie in memory one behind the other: what it is made of is written."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return None
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    numbers = whole.flatten().view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad, hashlib.sha256(numbers).hexdigest()
