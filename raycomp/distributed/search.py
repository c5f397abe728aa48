"""A stage's searches on the cluster: candidates are judged side by side, and what was judged outlives the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from pydantic import TypeAdapter
from ray.util import ActorPool

from raycomp.config import JobConfig
from raycomp.distributed.cluster import Cluster
from raycomp.distributed.records import read_record, write_record
from raycomp.distributed.run_store import RunStore
from raycomp.distributed.task_recipe import TaskRecipe
from raycomp.errors import RaycompError
from raycomp.pipeline.build import ResolvedStage
from raycomp.pipeline.latency import Timed, timed_budgets, with_macs, within_latency
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


_TIMED = TypeAdapter(list[Timed])


def time_budgets(order: SearchOrder) -> tuple[ResolvedStage, list[str]]:
    """The stage with a part of the multiply-accumulates in place of every budget of latency, and what was found.

    Runs on the head node, which times the result, too. What was found before an interruption isn't timed again.
    """
    job, index, name = order.job, order.index, f"latency-{order.index}.json"
    places = timed_budgets(job, index)
    known = read_record(order.run_store.files, name, _TIMED) or []
    resolved, found = order.resolved, list[Timed]()
    with scratch() as folder, data_made_once():
        for number, place in enumerate(places):
            if number < len(known):
                timed = known[number]
                resolved = with_macs(resolved, place, timed.macs)
            else:
                task = order.recipe.make(job.task, order.run_store.fetch_prepared(folder))
                start = order.run_store.fetch_start(index)
                resolved, timed = within_latency(job, index, place, task, start, resolved)
            found.append(timed)
    if len(known) < len(places):
        write_record(order.run_store.files, name, _TIMED, found)
    return resolved, [f"stage {job.stages[index].name}: {timed.told}" for timed in found]


def run_searches(order: SearchOrder, cluster: Cluster, tell: Callable[[str], None]) -> ResolvedStage:
    """All searches of a stage; what was judged before an interruption isn't judged again.

    Args:
        order: what is searched; its place is that of each search in turn.
        cluster: where.
        tell: hears how far a search is.

    Raises:
        RaycompError: what judging a candidate raised.
        ClusterError: judges were lost again and again.
    """
    resolved = order.resolved
    for place in searches(order.job.stages[order.index]):
        own = SearchOrder(order.job, order.recipe, order.run_store, resolved, order.index, place)
        resolved = _run(own, cluster, tell)
    return resolved


def found_by_searches(job: JobConfig, run_store: RunStore) -> tuple[SearchFigures, ...]:
    """What all stages' searches found."""
    places = [(index, place) for index, stage in enumerate(job.stages) for place in searches(stage)]
    records = [read_record(run_store.files, _name(*each), _ADAPTER) for each in places]
    return tuple(record.figures for record in records if record is not None and record.figures is not None)


def _run(order: SearchOrder, cluster: Cluster, tell: Callable[[str], None]) -> ResolvedStage:
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
        resolved, figures = search.run(judge, stored.rounds, told)
    write_record(order.run_store.files, name, _ADAPTER, SearchRecord(rounds, figures))
    return resolved


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
