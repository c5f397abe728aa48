"""The base of layerwise distillers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raycomp.config import DistillTarget, nearest
from raycomp.core.attach import replace_part
from raycomp.core.chain import Chain
from raycomp.core.compressor import Compressor, ConfigList
from raycomp.core.selection import Kind, module_names
from raycomp.core.target import TargetId, target_kind
from raycomp.distillation.losses import DISTANCES
from raycomp.distillation.recorder import Recorder
from raycomp.errors import CompressionError, ConfigError, Problem
from raycomp.evaluators.plain import TorchEvaluator


class LayerwiseDistiller(Compressor):
    """Trains λ₀·L + Σ λᵢ·dᵢ: the distances of a student's module outputs from those of linked teacher modules.

    The teacher runs in evaluation mode and without gradients, whatever mode it is handed over in; nothing of it
    changes.

    Args:
        model: the student, changed in place.
        config_list: see `DistillEntry`; `link` names the teacher's modules ("auto": the one of the same name).
        evaluator: how to train.
        teacher_model: the teacher.
        teacher_predict: `teacher_predict(batch, teacher)` runs the teacher on the batch that the student had.
        origin_loss_lambda: λ₀.
    """

    kind: ClassVar[Kind] = "distiller"

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: TorchEvaluator | None = None,
        teacher_model: nn.Module | None = None,
        teacher_predict: Callable[[Any, nn.Module], Any] | None = None,
        origin_loss_lambda: float = 1.0,
    ) -> None:
        if teacher_model is None or teacher_predict is None:
            raise CompressionError(f"{type(self).__name__} needs teacher_model and teacher_predict")
        self.teacher = teacher_model
        self.teacher_predict = teacher_predict
        self.origin_loss_lambda = origin_loss_lambda
        self.recorders: dict[TargetId, Recorder] = {}
        self.teacher_values: dict[TargetId, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._teacher_modes: list[tuple[nn.Module, bool]] = []
        super().__init__(model, config_list, evaluator)

    @classmethod
    def from_compressor(cls, compressor: Any, config_list: ConfigList, *args: Any, **kwargs: Any) -> Any:
        """As `Compressor.from_compressor`; NNI's order `(compressor, config_list, teacher_model, …)` holds."""
        if args and isinstance(args[0], nn.Module):
            names = ("teacher_model", "teacher_predict", "origin_loss_lambda", "evaluator")
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            args = ()
        return cls(compressor.chain, config_list, *args, **kwargs)

    @abstractmethod
    def combine(self, distances: dict[TargetId, list[Tensor]]) -> dict[TargetId, Tensor]:
        """One distance per target from its distances to each of its links."""

    def links(self, target_id: TargetId) -> list[TargetId]:
        """The teacher's targets that a student's target is held against."""
        link = self._settings(target_id).link
        names = [target_id.module] if link == "auto" else [link] if isinstance(link, str) else list(link)
        return [TargetId(name, target_id.target) for name in names]

    def check(self) -> None:
        """Refuses links that the teacher lacks, and targets that are no outputs."""
        known = module_names(self.teacher)
        problems = []
        for target_id, selected in self.selected.items():
            if target_kind(target_id.target) != "output":
                problems.append(Problem(selected.where, f"{target_id} is no output", "distil `_output_` targets"))
            for link in self.links(target_id):
                if link.module not in known:
                    message = f"the teacher has no module {link.module!r} for {target_id}"
                    problems.append(Problem(f"{selected.where}.link", message, nearest(link.module, known)))
        if problems:
            raise ConfigError(problems)

    def attach(self) -> None:
        for target_id, selected in self.selected.items():
            recorder = self.recorders.setdefault(target_id, Recorder())
            owner = f"{type(self).__name__} {selected.where}"
            self.chain.space.target(target_id).claim("recorder", recorder, owner)

    def on_run(self, running: bool) -> None:
        for recorder in self.recorders.values():
            recorder.open = running
            recorder.values.clear()
        if not running:
            while self._handles:
                self._handles.pop().remove()
            for module, training in self._teacher_modes:
                module.training = training
            return
        self._teacher_modes = [(module, module.training) for module in self.teacher.modules()]
        self.teacher.to(next(self.model.parameters()).device).eval()
        for link in {link for target_id in self.recorders for link in self.links(target_id)}:
            module = self.teacher.get_submodule(link.module)
            self._handles.append(module.register_forward_hook(self._teacher_hook(link)))

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """Runs the teacher on `batch` and adds the distances."""
        with torch.no_grad():
            self.teacher_predict(batch, self.teacher)
        distances = {target_id: self._distances(target_id) for target_id in self.recorders}
        self.teacher_values.clear()
        total = self.origin_loss_lambda * loss
        for target_id, distance in self.combine(distances).items():
            total = total + self._settings(target_id).lambda_ * distance
        return total

    def _settings(self, target_id: TargetId) -> DistillTarget:
        settings = self.selected[target_id].settings
        assert isinstance(settings, DistillTarget)
        return settings

    def _teacher_hook(self, link: TargetId) -> Callable[[nn.Module, Any, Any], None]:
        def note(value: Tensor) -> Tensor:
            self.teacher_values.setdefault(link, []).append(value)
            return value

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            replace_part(output, link.target.removeprefix("_output_"), note)

        return keep

    def _distances(self, target_id: TargetId) -> list[Tensor]:
        student = self.recorders[target_id].take(target_id)
        distance_fn = DISTANCES[self._settings(target_id).apply_method]
        return [self._distance(target_id, link, student, distance_fn) for link in self.links(target_id)]

    def _distance(
        self,
        target_id: TargetId,
        link: TargetId,
        student: list[Tensor],
        distance_fn: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        teacher = self.teacher_values.get(link, [])
        shapes = [tuple(value.shape) for value in student], [tuple(value.shape) for value in teacher]
        if shapes[0] != shapes[1]:
            raise CompressionError(
                f"the student gives {shapes[0]}, the teacher's {link} gives {shapes[1]}",
                where=str(target_id),
                remedy="link modules whose outputs have the same shape",
            )
        pairs = zip(student, teacher, strict=True)
        return torch.stack([distance_fn(ours, theirs.to(ours)) for ours, theirs in pairs]).sum()
