"""A stage's searches: what candidates are of, how they are judged, and what the stage prunes by afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from raycomp.config import JobConfig, StageConfig
from raycomp.config.compressors import SearchSettings
from raycomp.pipeline.build import ResolvedStage, pruner_at, weight_dtype
from raycomp.pipeline.stage import StageStart, stage_chain
from raycomp.pipeline.task import Task, given_data
from raycomp.pipeline.training.metrics import evaluate
from raycomp.pruning.bases.searching import SearchingPruner, judge_by
from raycomp.pruning.pruner import Pruner
from raycomp.pruning.search.search import Judge, Judged, Search, searched
from raycomp.pruning.search.space import SearchSpace, config_list
from raycomp.results.summary import SearchFigures


def searches(stage: StageConfig) -> list[int]:
    """The places of a stage's compressors that search."""
    return [place for place, each in enumerate(stage.compressors) if isinstance(each, SearchSettings)]


class StageSearch:
    """One search of a stage, over the model that the stage starts from; the same in every process.

    Args:
        job: the job.
        index: the stage's.
        place: that of the compressor that searches.
        task: the user's.
        start: what the stages before left.
        resolved: what the stage's config lists mean for that model.
        device: where candidates are judged.
    """

    def __init__(
        self,
        job: JobConfig,
        index: int,
        place: int,
        task: Task,
        start: StageStart,
        resolved: ResolvedStage,
        device: torch.device | None = None,
    ) -> None:
        self.job, self.index, self.place, self.task, self.resolved = job, index, place, task, resolved
        self.device = device or torch.device("cpu")
        self.stage = job.stages[index]
        chain = stage_chain(job, index, task, start, resolved, self.device)
        pruner = pruner_at(chain, place)
        self.space = SearchSpace(pruner)
        self.judge: Judge = judge_by(pruner, self.space, self._metric)
        self._settings = self.stage.compressors[place]
        self._searching = _searching(self._settings, pruner)

    def run(
        self,
        judge: Judge | None = None,
        known: Sequence[Sequence[float]] = (),
        told: Callable[[Search], None] = lambda search: None,
        *,
        is_over: bool = False,
    ) -> tuple[ResolvedStage, SearchFigures]:
        """Searches to the end.

        Args:
            judge: judges the candidates of a round; default: this process, one after the other.
            known: the metrics of rounds that were judged before.
            told: hears of every round.
            is_over: whether the known rounds are all there are.

        Returns:
            the stage, which prunes by what was found, and what the report says.
        """
        search = self._searching.search(self.space)
        total = sum(map(len, known))
        goes_on = (lambda search: len(search.judged) < total) if is_over else self._searching.limits.go_on
        best = searched(search, judge or self.judge, known=known, goes_on=goes_on, told=told)
        selections = list(self.resolved.selections)
        selections[self.place] = self.space.chosen(best.ratios)
        return ResolvedStage(tuple(selections)), self._figures(search, best)

    def _metric(self, model: nn.Module) -> float:
        """The task's first metric."""
        training, evaluation = self.job.training_for(self.stage), self.job.evaluation
        found = evaluate(
            self.task,
            model,
            given_data(self.task, "eval"),
            batch_size=evaluation.batch_size,
            device=self.device,
            dtype=weight_dtype(training),
            max_samples=evaluation.max_samples,
        )
        return next(iter(found.values()))

    def _figures(self, search: Search, best: Judged) -> SearchFigures:
        return SearchFigures(
            stage=self.stage.name,
            compressor=self._settings.type,
            judged=len(search.judged),
            first=search.judged[0].metric,
            best=best.metric,
            parts=dict(zip(self.space.names, best.ratios, strict=True)),
            config_list=config_list(self.space.chosen(best.ratios)),
        )


def _searching(settings: Any, pruner: Pruner) -> SearchingPruner:
    values = {name: getattr(settings, name) for name in type(settings).model_fields if name not in ("type", "pruner")}
    made: SearchingPruner = settings.registration.load()(pruner, **values)
    return made


def search_stage(
    job: JobConfig, index: int, task: Task, start: StageStart, resolved: ResolvedStage
) -> tuple[ResolvedStage, list[SearchFigures]]:
    """All searches of a stage, one after the other, in this process; see `StageSearch.run`."""
    figures = []
    for place in searches(job.stages[index]):
        resolved, found = StageSearch(job, index, place, task, start, resolved).run()
        figures.append(found)
    return resolved, figures
