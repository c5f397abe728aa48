"""Attaching targets to a live model, and taking them off again without a trace.

Parameters get a `torch.nn.utils.parametrize` parametrization, so the Parameter object stays the one that optimizers and
tied modules hold; inputs and outputs get forward (pre-)hooks. Nothing is cloned or replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from raycomp.core.target import Target, TargetId
from raycomp.errors import CompressionError

_CONTAINER = "raycomp_targets"


class HookedTargets(nn.Module):
    """A module's input and output targets, registered as its child so that their state belongs to the model.

    Called as a layer it is the identity: `nn.Sequential` runs all of its children.
    """

    def __init__(self, signature: tuple[str, ...]) -> None:
        super().__init__()
        self.signature = signature
        self.targets = nn.ModuleDict()

    def forward(self, value: Any) -> Any:
        """Returns `value`."""
        return value

    def on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The pre-hook: passes each targeted argument, positional or by keyword, through its target."""
        positional, named = list(args), dict(kwargs)
        for name, target in self._of_kind("input"):
            index, keyword = self._argument(name)
            if index is not None and index < len(positional):
                positional[index] = target(positional[index])
            elif keyword in named:
                named[keyword] = target(named[keyword])
        return tuple(positional), named

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook: passes each targeted part of the output through its target."""
        for name, target in self._of_kind("output"):
            output = replace_part(output, name.removeprefix("_output_"), target)
        return output

    def _of_kind(self, kind: str) -> list[tuple[str, Target]]:
        found = [(name, target) for name, target in self.targets.items() if isinstance(target, Target)]
        return [(name, target) for name, target in found if target.kind == kind]

    def _argument(self, name: str) -> tuple[int | None, str | None]:
        key = name.removeprefix("_input_")
        if key.isdigit():
            index = int(key)
            return index, self.signature[index] if index < len(self.signature) else None
        return (self.signature.index(key) if key in self.signature else None), key


def replace_part(output: Any, key: str, target: Callable[[Any], Any]) -> Any:
    """`output` with the part that `key` (an index, a field or a mapping's key) names passed through `target`."""
    if isinstance(output, Mapping):
        names = list(output)
        name = names[int(key)] if key.isdigit() and int(key) < len(names) else key
        if name in output:
            output[name] = target(output[name])  # type: ignore[index]  # in place: keeps the user's output class
        return output
    if isinstance(output, tuple | list):
        if not key.isdigit() and key in getattr(output, "_fields", ()):
            key = str(output._fields.index(key))  # type: ignore[union-attr]
        if not key.isdigit() or int(key) >= len(output):
            return output
        parts = [target(part) if index == int(key) else part for index, part in enumerate(output)]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return target(output) if key == "0" else output


class TargetSpace:
    """All targets that stand on one model, shared by every compressor that is fused on it.

    Args:
        model: the model; it is changed in place by `attach` and restored by `detach`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.targets: dict[TargetId, Target] = {}
        self._undo: list[Callable[[], None]] = []

    def target(self, target_id: TargetId) -> Target:
        """The target of that name, made and attached on first use."""
        if target_id not in self.targets:
            target = Target(target_id)
            module = self.module(target_id.module)
            if target.kind == "parameter":
                self._attach_parameter(module, target)
            else:
                self._attach_hooks(module, target)
            self.targets[target_id] = target
        return self.targets[target_id]

    def module(self, name: str) -> nn.Module:
        """The model's module of that name."""
        return self.model.get_submodule(name)

    def parameter(self, target_id: TargetId) -> nn.Parameter:
        """The Parameter below a parameter target, untouched by masks and quantizers."""
        return original_parameter(self.module(target_id.module), target_id.target)

    def swap_class(self, module: nn.Module, mixin: type[nn.Module]) -> None:
        """Gives `module` a class of its own that puts `mixin`'s methods before those of its present class."""
        before = type(module)
        module.__class__ = type(before.__name__, (mixin, before), {"raycomp_swapped": True})
        self.on_detach(lambda: setattr(module, "__class__", before))

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Registers what `detach` must undo; the last is undone first."""
        self._undo.append(undo)

    def detach(self) -> None:
        """Takes every target off; the model is again of the user's classes, hooks and parameters alone."""
        while self._undo:
            self._undo.pop()()
        self.targets.clear()

    def _attach_parameter(self, module: nn.Module, target: Target) -> None:
        name = target.target_id.target
        if parametrize.is_parametrized(module, name):
            raise CompressionError(
                "this parameter already has a parametrization of its own",
                where=str(target.target_id),
                remedy="remove it (torch.nn.utils.parametrize.remove_parametrizations) before compressing",
            )
        order = list(module._parameters)
        parametrize.register_parametrization(module, name, target, unsafe=True)
        self.on_detach(lambda: _remove_parametrization(module, name, order))

    def _attach_hooks(self, module: nn.Module, target: Target) -> None:
        container = getattr(module, _CONTAINER, None)
        if container is None:
            container = HookedTargets(tuple(inspect.signature(module.forward).parameters))
            module.add_module(_CONTAINER, container)
            handles = (
                module.register_forward_pre_hook(container.on_inputs, with_kwargs=True),
                module.register_forward_hook(container.on_output, with_kwargs=True),
            )
            self.on_detach(lambda: delattr(module, _CONTAINER))
            for handle in handles:
                self.on_detach(handle.remove)
        container.targets[target.target_id.target] = target


def original_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The Parameter `name` of `module`, whether it is parametrized or not."""
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index, union-attr, return-value]
    return module._parameters[name]  # type: ignore[return-value]


def _remove_parametrization(module: nn.Module, name: str, order: list[str]) -> None:
    # torch's remove_parametrizations deletes the property from the class, which a deepcopy of the module shares.
    original = original_parameter(module, name)
    parametrizations: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    del parametrizations[name]
    if len(parametrizations) == 0:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    module._parameters[name] = original
    known = [key for key in order if key in module._parameters]
    module._parameters = {key: module._parameters[key] for key in [*known, *(set(module._parameters) - set(known))]}
