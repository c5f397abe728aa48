"""ModelSpeedup: from a model and its masks to a smaller model with the same outputs."""

from __future__ import annotations

import copy
import dis
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from raycomp.config.values import shown
from raycomp.core.masks import Masks
from raycomp.core.parts import as_call
from raycomp.core.public import Public
from raycomp.errors import Problem, SpeedupError
from raycomp.results.summary import Unpruned
from raycomp.speedup.analysis.analyse import Analysis, analyse, masked_elements
from raycomp.speedup.analysis.propagate import run
from raycomp.speedup.analysis.training_only import training_pins
from raycomp.speedup.analysis.unpruned import unpruned
from raycomp.speedup.graph.example import Example, batch_size, with_batch_size
from raycomp.speedup.graph.trace import trace
from raycomp.speedup.graph.value_masks import (
    buffer_name,
    fitted_masks,
    full_name,
    masked_copy,
    new_value_masks,
    settle_value_masks,
    value_masks,
)
from raycomp.speedup.rules import RULES
from raycomp.speedup.rules.base import Kept, Registry, Rule, tolerating
from raycomp.speedup.surgery.apply import cut
from raycomp.speedup.surgery.build import absorb_constants, build
from raycomp.speedup.surgery.graph_code import CannotRewriteError
from raycomp.speedup.surgery.plan import Plan, Surgery
from raycomp.speedup.surgery.pretrained import settle_config_
from raycomp.speedup.surgery.rewrite import rewrite
from raycomp.speedup.verify import compare, draws, outputs, summarise, verify

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUGH_TOLERANCE = 2e-2
_WORTH_A_CLASS = 0.1
"""The part of all parameters that must go beyond what the user's own forward allows, to replace one that takes more."""


class UnprunedWarning(UserWarning):
    """What is masked, and could not be cut without changing the outputs."""


class ModelSpeedup(Public):
    """Cuts what masks made removable out of a model.

    The result gives the masked model's outputs: the next bias absorbs what is constant where that is exact,
    what no output depends on goes, and everything else stays and is named in `unpruned`. The user's classes and
    hierarchy stay, too, unless the forward states sizes as constants; then the result is a graph module, over the same
    layers under the same names, which is called as the example is. A forward that takes more than the example gives
    (labels) is only replaced where a tenth of the parameters depends on it. The model that was given is left as it is.

    Args:
        model: a model without compressors on it.
        dummy_input: an example input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        masks: masks by module and target, 1 = keep; masks of inputs (`_input_0`) and outputs (`_output_0`) count, too.
            `Masks` say how each was applied in training, others were multiplied.
        exact: False cuts every coordinate that the masks made constant, also where that changes the outputs, and where
            training bypassed the mask; `inexact_difference` says by how much.
        customized_rules: rules for further operators, by their names (`my_library.my_operator`).
        graph_module: a graph module with the same parameters, traced in place of a model that can't be exported.
        others: further inputs, of other lengths or image sizes, which the smaller model takes as the given one does.

    After `speedup_model`: `plan`, `unpruned`, `inexact_difference` (relative to the outputs' range), `simulated` (the
    masked model).

    Raises:
        ConfigError: with everything that is wrong in the arguments.
        CompressionError: the masks are no tensors by module and target.
        SpeedupError: masks don't fit the model, or the model can't be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Example,
        masks: Mapping[str, Mapping[str, Tensor]],
        *,
        exact: bool = True,
        customized_rules: Mapping[str, Rule] | None = None,
        graph_module: fx.GraphModule | None = None,
        others: Sequence[Example] = (),
    ) -> None:
        self.plan = Plan()
        self.unpruned: tuple[Unpruned, ...] = ()
        self.inexact_difference: float | None = None
        trained = fitted_masks(model, Masks.canonical(masks), dummy_input)
        self.simulated = masked_copy(model, trained)
        self._modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
        self._example = dummy_input
        self._others = tuple(others)
        self._exact = exact
        self._masks = trained if exact else _never_bypassed(trained)
        self._masked = self.simulated if exact else masked_copy(model, self._masks)
        self._rules = RULES.extended(customized_rules or {})
        self._traced = masked_copy(graph_module, self._masks) if graph_module is not None else self._masked
        self._old_value_masks = set(value_masks(model))
        self._new_value_masks = new_value_masks(self._masked, model)

    @classmethod
    def argument_problems(cls, arguments: Mapping[str, Any]) -> Iterator[Problem]:
        model, masks = arguments.get("model"), arguments.get("masks")
        if "model" in arguments and not isinstance(model, nn.Module):
            yield Problem("ModelSpeedup.model", f"got {shown(model)}", "should be a torch.nn.Module")
        if "masks" in arguments and not isinstance(masks, Mapping):
            remedy = "should be {module: {target: mask}}; of a file, torch.load(path, weights_only=True)"
            yield Problem("ModelSpeedup.masks", f"got {shown(masks)}", remedy)

    def speedup_model(self) -> nn.Module:
        """The smaller model, each module in the training or eval mode that it had in the given model.

        A warning tells a caller who drops it: the given model is not changed in place, as NNI's was. Another one tells
        what is masked and stays.
        """
        if _is_dropped(sys._getframe(1)):
            message = "the model was not changed in place: write model = ModelSpeedup(...).speedup_model()"
            warnings.warn(message, stacklevel=2)
        model = tolerating(self._rules, self._speedup)
        if self.unpruned:
            warnings.warn(_what_stays(self.unpruned), UnprunedWarning, stacklevel=2)
        return model

    def _speedup(self, rules: Registry) -> nn.Module:
        graph = trace(self._traced, self._example)
        tensors = run(graph)
        masked = masked_elements(graph, self._traced, self._masks)
        pins = training_pins(graph, self._traced, self._example, rules)
        made: list[tuple[Analysis, nn.Module, Surgery]] = []
        for rigid in (False, True):
            analysis = analyse(graph, rules, tensors, masked, pins=pins, exact=self._exact, rigid=rigid)
            operated = self._operate(analysis, allow_rewrite=not rigid)
            if operated is not None:
                made.append((analysis, *operated))
            if made and not self._loses_arguments(made[0][2]):
                break
        if not made:
            why = (
                "; its forward gives other outputs each time, in evaluation, too"
                if draws(self._masked, self._example)
                else ""
            )
            analysis.decision.keep_all(
                f"the cut model's outputs differed from the masked model's, so nothing was cut{why}"
            )
            made.append((analysis, copy.deepcopy(self._masked), Surgery()))
        analysis, model, surgery = self._preferred(made)
        self.unpruned = unpruned(analysis, self._traced, self._masks)
        return self._finish(model, surgery)

    def _loses_arguments(self, surgery: Surgery) -> bool:
        """Whether a rewritten forward, which is called as the example is, takes less than the user's own."""
        if surgery.graph is None:
            return False
        args, kwargs = as_call(self._example)
        forward = inspect.signature(self._traced.forward)
        return bool(forward.parameters.keys() - forward.bind(*args, **kwargs).arguments.keys())

    def _preferred(self, made: Sequence[tuple[Analysis, nn.Module, Surgery]]) -> tuple[Analysis, nn.Module, Surgery]:
        """The model of the user's own class with all its arguments, unless that keeps too much of what could go."""
        smallest, whole = made[0], made[-1]
        sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (smallest[1], whole[1])]
        of_all = sum(parameter.numel() for parameter in self._masked.parameters())
        return smallest if sizes[1] - sizes[0] > _WORTH_A_CLASS * of_all else whole

    def _operate(self, analysis: Analysis, allow_rewrite: bool) -> tuple[nn.Module, Surgery] | None:
        """The cut model: live, or behind a rewritten forward; None where neither gives the right outputs."""
        surgery = build(analysis.graph, analysis.rules, analysis.atoms, analysis.decision, self._traced)
        live = copy.deepcopy(self._masked)
        absorb_constants(live, analysis.decision)
        cut(live, surgery)
        if self._exact and self._agrees(self.simulated, live):
            return live, surgery
        if not allow_rewrite:
            return None if self._exact or not self._agrees(live, live) else (live, surgery)
        rewritten = self._rewritten(copy.deepcopy(live), analysis)
        if rewritten is None:
            return None
        module, text = rewritten
        # Inexact cuts can be held against no masked model, but against a forward that states all sizes.
        if not self._exact and self._agrees(module, live):
            return live, surgery
        if self._agrees(self.simulated if self._exact else module, module):
            return module, replace(surgery, graph=text)
        return None

    def _rewritten(self, live: nn.Module, analysis: Analysis) -> tuple[fx.GraphModule, dict[str, Any]] | None:
        kept = Kept(analysis.atoms, analysis.decision.removed)
        try:
            return rewrite(live, self._traced, self._example, analysis.graph, analysis.rules, kept, self._others)
        except (CannotRewriteError, SpeedupError):
            return None

    def _finish(self, model: nn.Module, surgery: Surgery) -> nn.Module:
        stay = settle_value_masks(model, self._new_value_masks, self._old_value_masks)
        restored = {full_name(name, buffer_name(target)) for name, target in self._new_value_masks}
        cuts = tuple(cut for cut in surgery.cuts if cut.tensor not in restored)
        surgery = replace(surgery, value_masks=stay, cuts=cuts)
        self.plan = Plan(() if surgery.is_empty else (surgery,))
        if not self._exact:
            self.inexact_difference = verify(self.simulated, model, [self._example], batch_sizes=[2]).relative
        for each in (model, self.simulated):
            for name, module in each.named_modules():
                module.training = self._modes.get(name, self._modes[""])
        settle_config_(model, [each for each in (surgery,) if not each.is_empty])
        return model

    def _agrees(self, expected: nn.Module, model: nn.Module) -> bool:
        """Whether two models give the same outputs, for one sample and more, on the example and beside it."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        tolerance = _TOLERANCES.get(dtype, _ROUGH_TOLERANCE)
        pairs = []
        sizes = list(dict.fromkeys((1, 2, batch_size(self._example))))
        for example in (self._example, _jittered(self._example), *self._others):
            for size in sizes:
                resized = with_batch_size(example, size)
                try:
                    right = outputs(expected, resized)
                except Exception:  # a model may refuse a batch size in its own way
                    continue
                try:
                    pairs.append(compare(right, outputs(model, resized)))
                except Exception:  # whatever the user's forward raises when it meets other sizes than it states
                    return False
        return bool(pairs) and summarise(pairs, tolerance, sizes).passed


def _what_stays(unpruned: Sequence[Unpruned]) -> str:
    most = max(unpruned, key=lambda item: item.count)
    others = len({item.module for item in unpruned}) - 1
    more = f" and {others} more modules" if others > 1 else " and another module" if others else ""
    reason = f"{most.reason} (the attribute unpruned names all)"
    return f"masked channels of {most.module}{more} stay in the model: {reason}"


def _is_dropped(caller: FrameType) -> bool:
    """Whether a caller, who is in the midst of a call, throws its result away."""
    rest = (each for each in dis.get_instructions(caller.f_code) if each.offset > caller.f_lasti)
    return next((each.opname for each in rest if each.opname != "CACHE"), "") == "POP_TOP"


def _never_bypassed(masks: Masks) -> Masks:
    return Masks(masks, {key: method for key, method in masks.methods.items() if method != "bypass"})


def _jittered(example: Example) -> Example:
    generator = torch.Generator().manual_seed(0)

    def jitter(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf + noise * (leaf.std() if leaf.numel() > 1 else 1)

    args, kwargs = as_call(example)
    return pytree.tree_map(jitter, kwargs) if kwargs else tuple(pytree.tree_map(jitter, arg) for arg in args)
