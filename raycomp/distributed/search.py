"""A stage's searches on the cluster: candidates are judged side by side, and what was judged outlives the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from pydantic import TypeAdapter
from ray.util import ActorPool

from raycomp.config import JobConfig
from raycomp.distributed.cluster import Cluster, on_head
from raycomp.distributed.records import read_record, write_record
from raycomp.distributed.run_store import RunStore
from raycomp.distributed.task_recipe import TaskRecipe
from raycomp.errors import RaycompError
from raycomp.pipeline.build import ResolvedStage
from raycomp.pipeline.latency import Timed, timed_budgets, within_latency
from raycomp.pipeline.search import StageSearch, searches
from raycomp.pipeline.task import data_made_once
from raycomp.pruning.search.search import Judge, Search
from raycomp.pruning.search.space import Ratios
from raycomp.report import text
from raycomp.results.summary import SearchFigures
from raycomp.storage import scratch


@dataclass(frozen=True)
class SearchOrder:
    """What a search is of.

    Args:
        job: the job.
        recipe: makes the task.
        run_store: where the run's files are.
        resolved: what the stage's config lists mean for the model that it starts from.
        index: the stage's.
        place: that of the compressor that searches.
    """

    job: JobConfig
    recipe: TaskRecipe
    run_store: RunStore
    resolved: ResolvedStage
    index: int
    place: int = 0

    @contextmanager
    def made(self, device: torch.device | None = None) -> Iterator[StageSearch]:
        """The search, in this process."""
        with scratch() as folder, data_made_once():
            task = self.recipe.make(self.job.task, self.run_store.fetch_prepared(folder))
            start = self.run_store.fetch_start(self.index)
            yield StageSearch(self.job, self.index, self.place, task, start, self.resolved, device)


@dataclass(frozen=True)
class SearchRecord:
    """What is known of a search.

    Args:
        rounds: the metrics of every round that was judged: with them it goes on where it was.
        figures: what it found, once it is over.
    """

    rounds: list[list[float]]
    figures: SearchFigures | None = None


_ADAPTER = TypeAdapter(SearchRecord)


class _Judge:
    """An actor that judges candidates."""

    def __init__(self, order: SearchOrder) -> None:
        torch.set_num_threads(order.job.scaling.threads_per_worker)
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._context = order.made(device)
        self._search = self._context.__enter__()

    def judge(self, ratios: Ratios) -> float:
        return self._search.judge([ratios])[0]


_TIMED = TypeAdapter(Timed)
Tell = Callable[[str], None]


def settle(order: SearchOrder, cluster: Cluster, tell: Tell, note: Tell) -> ResolvedStage:
    """What a stage prunes by, once its budgets of latency are timed and its searches have found what they look for.

    What was timed or judged before an interruption isn't again.

    Args:
        order: what is settled; its place is that of each compressor in turn.
        cluster: where candidates are judged; latencies are timed on the head node, as the result's.
        tell: hears how far a search is.
        note: hears what the report should say.

    Raises:
        RaycompError: what judging a candidate raised.
        ClusterError: judges were lost again and again.
    """
    stage = order.job.stages[order.index]
    timed, searching = timed_budgets(order.job, order.index), searches(stage)
    for place in range(len(stage.compressors)):
        own = asked = replace(order, place=place)
        if place in timed:
            resolved, found = on_head(_timed, own, None)
            own = replace(own, resolved=resolved)
        if place in searching:
            resolved, parts = _searched(own, cluster, tell)
            own = replace(own, resolved=resolved)
            if place in timed:
                # Layers that lose unlike parts take another time than such as lose alike.
                resolved, found = on_head(_timed, asked, parts)
                own = replace(own, resolved=resolved)
        if place in timed:
            note(f"stage {stage.name}: {found.told}")
        order = own
    return order.resolved


def _timed(order: SearchOrder, parts: Ratios | None) -> tuple[ResolvedStage, Timed]:
    name = f"latency-{order.index}-{order.place}{'' if parts is None else '-found'}.json"
    known = read_record(order.run_store.files, name, _TIMED)
    with scratch() as folder, data_made_once():
        task = order.recipe.make(order.job.task, order.run_store.fetch_prepared(folder))
        start = order.run_store.fetch_start(order.index)
        resolved, timed = within_latency(order.job, order.index, order.place, task, start, order.resolved, parts, known)
    if known is None:
        write_record(order.run_store.files, name, _TIMED, timed)
    return resolved, timed


def found_by_searches(job: JobConfig, run_store: RunStore) -> tuple[SearchFigures, ...]:
    """What all stages' searches found."""
    places = [(index, place) for index, stage in enumerate(job.stages) for place in searches(stage)]
    records = [read_record(run_store.files, _name(*each), _ADAPTER) for each in places]
    return tuple(record.figures for record in records if record is not None and record.figures is not None)


def _searched(order: SearchOrder, cluster: Cluster, tell: Tell) -> tuple[ResolvedStage, Ratios]:
    name = _name(order.index, order.place)
    stored = read_record(order.run_store.files, name, _ADAPTER) or SearchRecord([])
    rounds, begun = list(stored.rounds), time.monotonic()

    def told(search: Search) -> None:
        rounds.append([each.metric for each in search.judged[sum(map(len, rounds)) :]])
        write_record(order.run_store.files, name, _ADAPTER, SearchRecord(rounds))
        done, fresh = len(search.judged), len(search.judged) - sum(map(len, stored.rounds))
        left = (time.monotonic() - begun) / fresh * (search.evaluations - done)
        tell(
            f"search of stage {order.job.stages[order.index].name}: {done} of {search.evaluations} choices judged, "
            f"best {search.best.metric:.4f}, {text.seconds(left)} left"
        )

    with order.made() as search, _judges(order, cluster) as judge:
        resolved, figures = search.run(judge, stored.rounds, told, is_over=stored.figures is not None)
    write_record(order.run_store.files, name, _ADAPTER, SearchRecord(rounds, figures))
    return resolved, tuple(figures.parts.values())


@contextmanager
def _judges(order: SearchOrder, cluster: Cluster) -> Iterator[Judge]:
    """Judges of candidates, as many as there will be workers; they are made when the first candidates come."""
    scaling, settings = order.job.scaling, order.job.stages[order.index].compressors[order.place]
    resources = dict(scaling.resources_per_worker)
    cpus, gpus = resources.pop("CPU", 1.0), resources.pop("GPU", float(cluster.use_gpu))
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "resources": resources}
    options |= {"max_restarts": scaling.max_failures, "max_task_retries": scaling.max_failures}
    actors: list[Any] = []

    def judge(candidates: Sequence[Ratios]) -> list[float]:
        if not actors:
            count = min(scaling.num_workers, settings.candidates)  # type: ignore[attr-defined]
            actors.extend(ray.remote(_Judge).options(**options).remote(order) for _ in range(count))
        try:
            return list(ActorPool(actors).map(lambda actor, ratios: actor.judge.remote(ratios), candidates))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaycompError):
                raise error.cause from None
            raise

    try:
        yield judge
    finally:
        for actor in actors:
            ray.kill(actor)


def _name(index: int, place: int) -> str:
    return f"search-{index}-{place}.json"
