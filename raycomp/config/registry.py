"""The register of algorithms: one registration ties settings to an implementation, its kind and its needs."""

from __future__ import annotations

from abc import ABC, abstractmethod, update_abstractmethods
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib import import_module
from numbers import Integral, Real
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from raycomp.config import nni
from raycomp.config.base import UNKNOWN_TYPE, Given, Settings, problems_of
from raycomp.config.values import nearest
from raycomp.errors import Problem

Kind = Literal["pruner", "quantizer", "distiller"]


class Need(Enum):
    """What an algorithm can't do its work without, beside the model."""

    TRAINING = "training"
    """Optimizer steps."""
    CALIBRATION = "calibration"
    """Forward passes in evaluation mode."""
    TEACHER = "teacher"
    """A model to learn from."""
    ROUNDS = "rounds"
    """Several trainings, one after the other."""
    SEARCH = "search"
    """The metric of many candidates, before any training."""


def _require_type(schema: dict[str, Any]) -> None:
    schema["required"] = ["type", *schema.get("required", ())]


class CompressorSettings(Settings, ABC):
    """What every compressor's settings share. Only registered subclasses can be constructed."""

    model_config = ConfigDict(json_schema_extra=_require_type)
    kind: ClassVar[Kind]
    type: str
    """The algorithm: the name of the compressor's class."""

    @property
    @abstractmethod
    def registration(self) -> Registration:
        """Set by `compressor`."""

    @property
    def least_steps(self) -> int:
        """Optimizer steps without which the algorithm has not done its work."""
        return 0


_Settings = TypeVar("_Settings", bound=CompressorSettings)


@dataclass(frozen=True)
class Registration:
    """An algorithm.

    Args:
        settings: its settings.
        implementation: where its class is, `package.module:Class`.
        needs: what it can't do its work without.
        schedulable: whether a schedule may be put around it.
        searchable: whether a search may say how much it prunes of each layer.
    """

    settings: type[CompressorSettings]
    implementation: str
    needs: frozenset[Need]
    schedulable: bool
    searchable: bool

    @property
    def name(self) -> str:
        """What job files call it: its class's name."""
        return self.implementation.rpartition(":")[2]

    @property
    def kind(self) -> Kind:
        """Whether it prunes, quantizes or distils."""
        return self.settings.kind

    def load(self) -> Any:
        """The class itself; its module is imported when this is first asked for."""
        return getattr(import_module(self.implementation.rpartition(":")[0]), self.name)

    def problems(self, arguments: Mapping[str, Any]) -> Iterator[Problem]:
        """What is wrong with those arguments of the class that are settings, each by itself and taken together."""
        given = {name: value for name, value in arguments.items() if name in self.settings.model_fields}
        for key in ("type", "config_list", "pruner"):
            given.pop(key, None)
        for conflict in self.settings.conflicts(Given(given)):
            yield Problem(self._argument(str(conflict.key[0]), None), conflict.message, conflict.remedy)
        for name, field in self.settings.model_fields.items():
            if name in given:
                kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
                try:
                    TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(_plain(arguments[name]))
                except ValidationError as error:
                    yield from problems_of(error, arguments, partial(self._argument, name))[:1]

    def _argument(self, name: str, _: object) -> str:
        return f"{self.name}.{name}"


def _plain(value: object) -> object:
    """NumPy's numbers as Python's, which settings are made of."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


_REGISTERED: dict[str, Registration] = {}
COMPRESSORS: Mapping[str, Registration] = MappingProxyType(_REGISTERED)
"""All algorithms, by the name that job files call them."""


def compressor(
    implementation: str, *, needs: Collection[Need] = (), schedulable: bool = False, searchable: bool = False
) -> Callable[[type[_Settings]], type[_Settings]]:
    """Registers the algorithm that the decorated class has the settings of; its key `type` is the algorithm's name.

    Args:
        implementation: where its class is, `package.module:Class`.
        needs: what it can't do its work without.
        schedulable: whether a schedule may be put around it.
        searchable: whether a search may say how much it prunes of each layer: it ranks weights as they are.

    Raises:
        ValueError: another algorithm has this name.
    """

    def register(settings: type[_Settings]) -> type[_Settings]:
        registration = Registration(settings, implementation, frozenset(needs), schedulable, searchable)
        name = registration.name
        assert settings.model_fields["type"].default == name, f"{settings.__name__}.type is not '{name}'"
        if name in _REGISTERED:
            other = _REGISTERED[name].implementation
            raise ValueError(f"two algorithms are named '{name}': {other} and {implementation}")
        _REGISTERED[name] = registration
        settings.registration = registration  # type: ignore[method-assign, assignment]
        return update_abstractmethods(settings)

    return register


@dataclass(frozen=True)
class OneOf:
    """Annotates `CompressorSettings`: those of any algorithm registered by then, chosen by their key `type`.

    Args:
        schedulable: only what a schedule may be put around.
        searchable: only what a search may be put around.
    """

    schedulable: bool = False
    searchable: bool = False

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        chosen = [
            each
            for each in COMPRESSORS.values()
            if each.schedulable >= self.schedulable and each.searchable >= self.searchable
        ]
        return core_schema.tagged_union_schema(
            {each.name: handler.generate_schema(each.settings) for each in chosen},
            discriminator="type",
            custom_error_type=UNKNOWN_TYPE,
            custom_error_message="no such type",
            custom_error_context={
                "choices": " ".join(each.name for each in chosen),
                "elsewhere": " ".join(each.name for each in COMPRESSORS.values() if each not in chosen),
            },
        )


def export_algorithms(
    package: str, kind: Kind, base: type
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package; its algorithms are imported when they are first used.

    Args:
        package: its name.
        kind: of its algorithms.
        base: the class that it exports beside them.
    """
    names = [base.__name__, *(each.name for each in COMPRESSORS.values() if each.kind == kind)]

    def load(name: str) -> Any:
        if name not in names:
            raise absent(package, name, names)
        return COMPRESSORS[name].load()

    return names, load, names.copy


def absent(package: str, name: str, names: Iterable[str]) -> ImportError | AttributeError:
    """The error for a name that a package lacks.

    It is an ImportError, whose text `from package import name` hands on, where it has more to say than which names
    there are: the name is an algorithm's, or one of NNI's.

    Args:
        package: which.
        name: what it lacks.
        names: what it has.
    """
    if name in COMPRESSORS:
        home = COMPRESSORS[name].implementation.rpartition(".")[0]
        return ImportError(f"{package} has no {name} (write from {home} import {name})", name=package)
    if name in nni.NAMES:
        return ImportError(f"{package} has no {name} ({nni.instead_of(name, COMPRESSORS)})", name=package)
    return AttributeError(f"module '{package}' has no attribute '{name}' ({nearest(name, names)})")
