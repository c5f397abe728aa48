"""Attaching targets to a live model, and taking them off again without a trace.

Parameters get a `torch.nn.utils.parametrize` parametrization, so the Parameter object stays the one that optimizers and
tied modules hold; inputs and outputs get forward (pre-)hooks. Nothing is cloned or replaced.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from raycomp.core.parts import replace_input, replace_output
from raycomp.core.target import Target, TargetId

_CONTAINER = "raycomp_targets"
_PARAMETRIZATIONS = "parametrizations"
_NOT_SENT = "_ddp_params_and_buffers_to_ignore"
"""Where DDP looks for the names of what it shall not send around."""


class HookedTargets(nn.Module):
    """A module's input and output targets, registered as its child so that their state belongs to the model.

    Called as a layer it is the identity: `nn.Sequential` runs all of its children.
    """

    def __init__(self, signature: Sequence[str]) -> None:
        super().__init__()
        self.signature = tuple(signature)
        self.targets = nn.ModuleDict()

    def forward(self, value: Any) -> Any:
        """Returns `value`."""
        return value

    def on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The pre-hook: passes each targeted argument, positional or by keyword, through its target."""
        for name, target in self._of_kind("input"):
            args, kwargs = replace_input(args, kwargs, name.removeprefix("_input_"), self.signature, target)
        return args, kwargs

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook: passes each targeted part of the output through its target."""
        for name, target in self._of_kind("output"):
            output = replace_output(output, name.removeprefix("_output_"), target)
        return output

    def _of_kind(self, kind: str) -> list[tuple[str, Target]]:
        found = [(name, target) for name, target in self.targets.items() if isinstance(target, Target)]
        return [(name, target) for name, target in found if target.kind == kind]


class TargetSpace:
    """All targets that stand on one model, shared by every compressor that is fused on it.

    Args:
        model: the model; it is changed in place by `attach` and restored by `detach`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.targets: dict[TargetId, Target] = {}
        self._undo: list[Callable[[], None]] = []
        self._parameter_order: dict[nn.Module, list[str]] = {}

    def target(self, target_id: TargetId) -> Target:
        """The target of that name, made and attached on first use."""
        if target_id not in self.targets:
            target = Target(target_id)
            if target.kind == "parameter":
                target = self._attach_parameter(target)
            else:
                self._attach_hooks(self.module(target_id.module), target)
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

    def keep_from_ddp(self) -> None:
        """Lets DDP leave alone the buffers of what stands on the targets now, masks as large as weights among them:
        they are decided from merged statistics, so every rank has the same."""
        before = getattr(self.model, _NOT_SENT, None)
        targets = [(name, module) for name, module in self.model.named_modules() if isinstance(module, Target)]
        ours = [f"{name}.{own}" for name, target in targets for own, _ in target.named_buffers()]
        setattr(self.model, _NOT_SENT, list(dict.fromkeys([*(before or ()), *ours])))
        self.on_detach(partial(_restore_attribute, self.model, _NOT_SENT, before))

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Registers what `detach` must undo; the last is undone first."""
        self._undo.append(undo)

    def detach(self) -> None:
        """Takes every target off; the model is again of the user's classes, hooks and parameters alone."""
        while self._undo:
            self._undo.pop()()
        self.targets.clear()
        self._parameter_order.clear()

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Within the block the model has the classes, children and parameters that its user gave it.

        What the user does by names and attributes (groups of an optimizer, a state dict) then finds what he wrote. The
        model is not to be run within the block.
        """
        changed = [module for module in self.model.modules() if self._is_ours(module)]
        before = [(module, module.__class__, module._parameters, module._modules) for module in changed]
        for module in changed:
            parameters = {**module._parameters, **_parametrized(module)}
            order = self._parameter_order.get(module, list(parameters))
            module.__class__ = user_class(module)
            module._parameters = {name: parameters[name] for name in sorted(parameters, key=_rank_in(order))}
            module._modules = {
                name: child for name, child in module._modules.items() if name not in (_CONTAINER, _PARAMETRIZATIONS)
            }
        try:
            yield
        finally:
            for module, kind, own_parameters, children in before:
                module.__class__ = kind
                module._parameters, module._modules = own_parameters, children

    def _is_ours(self, module: nn.Module) -> bool:
        """Whether compressors changed the module; one that the user parametrized, too, can only be shown as it is."""
        if _PARAMETRIZATIONS in module._modules:
            ours = [isinstance(chain[0], Target) for chain in module.parametrizations.values()]  # type: ignore[operator, union-attr]
            return all(ours)
        return _CONTAINER in module._modules or user_class(module) is not type(module)

    def _attach_parameter(self, target: Target) -> Target:
        """Puts `target` on the Parameter in every module that holds it; gives the one that a tied name has already."""
        parameter = self.parameter(target.target_id)
        for tied in self.targets.values():
            if tied.kind == "parameter" and self.parameter(tied.target_id) is parameter:
                return tied
        for holder, own_name in list(_holders(self.model, parameter)):
            order = self._parameter_order.setdefault(holder, list(holder._parameters))
            if isinstance(holder, nn.RNNBase) and not isinstance(holder, _ReadsItsWeights):
                self.swap_class(holder, _ReadsItsWeights)
            parametrize.register_parametrization(holder, own_name, target, unsafe=True)
            self.on_detach(partial(remove_parametrization, holder, own_name, order))
        return target

    def _attach_hooks(self, module: nn.Module, target: Target) -> None:
        container = getattr(module, _CONTAINER, None)
        if container is None:
            container = HookedTargets(forward_arguments(module)[0])
            if isinstance(module, nn.Sequential):
                self.swap_class(module, _LayersAlone)
            module.add_module(_CONTAINER, container)
            handles = (
                module.register_forward_pre_hook(container.on_inputs, with_kwargs=True),
                module.register_forward_hook(container.on_output, with_kwargs=True),
            )
            self.on_detach(lambda: delattr(module, _CONTAINER))
            for handle in handles:
                self.on_detach(handle.remove)
        container.targets[target.target_id.target] = target


class _ReadsItsWeights(nn.Module):
    """For recurrent layers, which keep a list of their Parameters and would pass over what stands on them."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kept = self._flat_weights
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            # What is computed belongs to a graph, and couldn't be copied with the model.
            self._flat_weights = kept


class _LayersAlone(nn.Module):
    """For an `nn.Sequential`: iteration, length and index see the user's layers and not the hooked targets."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self._modules.items() if name != _CONTAINER and module is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, index: int | slice) -> nn.Module:
        layers = {name: module for name, module in self._modules.items() if name != _CONTAINER and module is not None}
        return nn.Sequential(OrderedDict(layers))[index]


def user_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as the user wrote it, below what compression put on top."""
    kind = type(module)
    while True:
        if kind.__dict__.get("raycomp_swapped"):
            kind = kind.__bases__[1]
        elif parametrize.is_parametrized(module) and kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}":
            kind = kind.__bases__[0]
        else:
            return kind


def forward_arguments(module: nn.Module) -> tuple[list[str], bool]:
    """The names of the arguments of the user's forward, and whether it takes any other by keyword."""
    forward = module.__dict__.get("forward") or user_class(module).forward.__get__(module)  # type: ignore[attr-defined]
    parameters = inspect.signature(forward).parameters.values()
    return [each.name for each in parameters], any(each.kind is each.VAR_KEYWORD for each in parameters)


def is_wrapped(model: nn.Module) -> bool:
    """Whether compressors stand on the model."""
    return any(isinstance(module, Target | HookedTargets) for module in model.modules())


def is_own_parameter(module: nn.Module, name: str) -> bool:
    """Whether `name` is a Parameter that the module holds itself, perhaps under compressors' targets."""
    if parametrize.is_parametrized(module, name):
        return isinstance(module.parametrizations[name][0], Target)  # type: ignore[index, union-attr]
    return module._parameters.get(name) is not None


def original_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The Parameter `name` of `module`, whether it is parametrized or not."""
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index, union-attr, return-value]
    return module._parameters[name]  # type: ignore[return-value]


def share_of_parameters(model: nn.Module, targets: Iterable[TargetId]) -> float:
    """What part of a model's parameters these are."""
    found = [original_parameter(model.get_submodule(name), target) for name, target in targets]
    sizes = {id(parameter): parameter.numel() for parameter in found}
    return sum(sizes.values()) / max(sum(parameter.numel() for parameter in model.parameters()), 1)


def without_quantizers(model: nn.Module) -> nn.Module:
    """A copy of a model under compression whose targets don't round: what its masks and folds alone compute."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, Target):
            module.quantizer = None
    return result


def remove_parametrization(module: nn.Module, name: str, order: Sequence[str] = ()) -> None:
    """Takes the parametrization off a parameter, which keeps its place among those that `order` names."""
    # torch's remove_parametrizations deletes the property from the class, which a deepcopy of the module shares.
    original = original_parameter(module, name)
    parametrizations: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    del parametrizations[name]
    if len(parametrizations) == 0:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
    else:
        module.__class__ = _without_property(type(module), name)
    module._parameters[name] = original
    known = [key for key in order if key in module._parameters]
    module._parameters = {key: module._parameters[key] for key in [*known, *module._parameters]}


def _restore_attribute(module: nn.Module, name: str, value: Any) -> None:
    if value is None:
        delattr(module, name)
    else:
        setattr(module, name, value)


def _without_property(parametrized: type, name: str) -> type:
    left = {key: value for key, value in vars(parametrized).items() if key not in (name, "__dict__", "__weakref__")}
    return type(parametrized.__name__, parametrized.__bases__, left)


def _parametrized(module: nn.Module) -> dict[str, nn.Parameter]:
    if _PARAMETRIZATIONS not in module._modules:
        return {}
    return {name: original_parameter(module, name) for name in module._modules[_PARAMETRIZATIONS]}  # type: ignore[attr-defined, union-attr]


def _rank_in(order: list[str]) -> Callable[[str], int]:
    return lambda name: order.index(name) if name in order else len(order)


def _holders(model: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[nn.Module, str]]:
    """Every module that holds the Parameter, and its name there."""
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is parameter:
                yield module, name
