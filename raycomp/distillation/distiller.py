"""The base of layerwise distillers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from raycomp.config import DistillTarget, nearest
from raycomp.config.values import shown
from raycomp.core.batch_share import counted_positions, weighted_by_positions, weighted_by_samples
from raycomp.core.chain import Chain
from raycomp.core.compressor import Compressor, ConfigList
from raycomp.core.evaluator import Evaluator
from raycomp.core.layout import traced_shapes
from raycomp.core.model import device_of
from raycomp.core.moments import RunContext
from raycomp.core.selection import Kind, module_names
from raycomp.core.target import TargetId, target_kind
from raycomp.distillation.losses import DISTANCES
from raycomp.distillation.recorder import Recorder
from raycomp.distillation.teacher import Outputs, Predict, Teacher
from raycomp.errors import CompressionError, ConfigError, Problem


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

    fusion_order = ("teacher_model", "teacher_predict", "origin_loss_lambda", "evaluator")

    def __init__(
        self,
        model: nn.Module | Chain,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        teacher_model: nn.Module | None = None,
        teacher_predict: Predict | None = None,
        origin_loss_lambda: float = 1.0,
    ) -> None:
        if teacher_model is None or teacher_predict is None:
            raise CompressionError(f"{type(self).__name__} needs teacher_model and teacher_predict")
        chain = model if isinstance(model, Chain) else Chain(model)
        self.teacher: Teacher = chain.common(teacher_model, lambda: Teacher(teacher_model))
        self.teacher_predict = teacher_predict
        self.origin_loss_lambda = origin_loss_lambda
        self.recorders: dict[TargetId, Recorder] = {}
        super().__init__(chain, config_list, evaluator)

    @classmethod
    def argument_problems(cls, arguments: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().argument_problems(arguments)
        student, teacher = arguments.get("model"), arguments.get("teacher_model")
        if not isinstance(teacher, nn.Module | None):
            yield Problem(f"{cls.__name__}.teacher_model", f"got {shown(teacher)}", "should be a torch.nn.Module")
        if teacher is not None and teacher in (student, getattr(student, "model", None)):
            remedy = "write teacher_model=copy.deepcopy(model) before compressors stand on it"
            yield Problem(f"{cls.__name__}.teacher_model", "it is the student itself", remedy)
        predict = arguments.get("teacher_predict")
        if predict is not None and not callable(predict):
            yield Problem(f"{cls.__name__}.teacher_predict", f"got {shown(predict)}", "should be a function")

    def unwrap_teacher_model(self) -> None:
        """Nothing: between trainings no compressor stands on the teacher; scripts of NNI's call it."""

    def translated(self, target_id: TargetId, link: TargetId, student: Tensor, teacher: Tensor) -> Tensor:
        """What of the student is held against the teacher's output: its own, as it is."""
        return student

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
        known = module_names(self.teacher.model)
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

    @property
    def rounds(self) -> int:
        return 1

    @property
    def loss_weight(self) -> float:
        return self.origin_loss_lambda

    def attach(self) -> None:
        for target_id in self.selected:
            recorder = self.recorders.setdefault(target_id, self.make_recorder(target_id))
            self.chain.space.target(target_id).add("recorders", recorder)

    def make_recorder(self, target_id: TargetId) -> Recorder:
        """The module that keeps what a target gives."""
        return Recorder()

    def rehearse(self) -> None:
        """Holds the shapes of linked outputs against each other, as far as the example input runs through both."""
        links = [link for target_id in self.recorders for link in self.links(target_id)]
        try:
            theirs = traced_shapes(self.teacher.model, links, self.chain.example)
        except CompressionError:
            # A teacher may take other inputs; teacher_predict knows them.
            return
        for target_id in self.recorders:
            ours = self.layouts[target_id].shape
            for link in self.links(target_id):
                if ours is not None and link in theirs and not self.fits(ours, theirs[link]):
                    message = f"the student gives {ours}, the teacher's {link} gives {theirs[link]}"
                    raise self.problem(self.selected[target_id], message, "link modules whose outputs fit each other")

    def fits(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> bool:
        """Whether outputs of these shapes can be held against each other."""
        return student == teacher

    def begin_run(self, context: RunContext) -> None:
        links = {link for target_id in self.recorders for link in self.links(target_id)}
        self.teacher.open(links, device_of(self.model))

    def end_run(self) -> None:
        self.teacher.close()
        for recorder in self.recorders.values():
            recorder.values.clear()

    def loss_term(self, batch: Any) -> Tensor:
        """Runs the teacher on `batch` and sums up the weighted distances."""
        outputs = self.teacher.outputs(batch, self.teacher_predict, self.chain.batch)
        distances = {target_id: self._distances(target_id, outputs) for target_id in self.recorders}
        combined = self.combine(distances).items()
        weighted = [self._settings(target_id).lambda_ * distance for target_id, distance in combined]
        return torch.stack(weighted).sum()

    def _settings(self, target_id: TargetId) -> DistillTarget:
        settings = self.selected[target_id].settings
        assert isinstance(settings, DistillTarget)
        return settings

    def _distances(self, target_id: TargetId, outputs: Outputs) -> list[Tensor]:
        student = self.recorders[target_id].take(target_id)
        return [self._distance(target_id, link, student, outputs.get(link, [])) for link in self.links(target_id)]

    def _distance(self, target_id: TargetId, link: TargetId, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        if len(student) != len(teacher):
            message = f"it ran {len(student)} times in the training step, the teacher's {link} {len(teacher)} times"
            remedy = "let teacher_predict run the teacher as often as the step runs the student"
            raise CompressionError(message, where=str(target_id), remedy=remedy)
        pairs = zip(student, teacher, strict=True)
        student = [self.translated(target_id, link, ours, theirs) for ours, theirs in pairs]
        shapes = [tuple(value.shape) for value in student], [tuple(value.shape) for value in teacher]
        if shapes[0] != shapes[1]:
            raise CompressionError(
                f"the student gives {shapes[0]}, the teacher's {link} gives {shapes[1]}",
                where=str(target_id),
                remedy="link modules whose outputs have the same shape",
            )
        pairs = zip(student, teacher, strict=True)
        return torch.stack([self._distance_of(target_id, ours, theirs.to(ours)) for ours, theirs in pairs]).sum()

    def _distance_of(self, target_id: TargetId, student: Tensor, teacher: Tensor) -> Tensor:
        """This rank's part of the distance of two outputs over the global batch, where padding doesn't count."""
        counted = counted_positions(student)
        distance = DISTANCES[self._settings(target_id).apply_method](student, teacher, counted)
        return weighted_by_samples(distance) if counted is None else weighted_by_positions(distance)
