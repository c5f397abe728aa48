"""Budgets of latency: which part of the multiply-accumulates takes that long, found by cutting and timing.

A latency can't be told from the graph. Before a stage trains, its masks are made from the weights as they are, for
one part of the multiply-accumulates after another; the model is cut, lowered where the job wants int8, and timed beside
the one that the stage starts from, as the result will be. The stage then prunes to the part that was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from raycomp.config import JobConfig, PruneTarget
from raycomp.core.chain import Chain
from raycomp.core.detached_copy import detached_copy
from raycomp.core.selection import Selection
from raycomp.core.target import TargetId
from raycomp.deploy.int8 import lower_int8
from raycomp.deploy.measure import latencies_s
from raycomp.deploy.onnx_export import export_onnx
from raycomp.deploy.onnx_runtime import load_onnx
from raycomp.pipeline.build import ResolvedStage, blank_calibration, pruner_at
from raycomp.pipeline.inputs import real_inputs
from raycomp.pipeline.stage import StageStart, stage_chain
from raycomp.pipeline.task import Task
from raycomp.pruning.graph import by_macs
from raycomp.pruning.saliency import l2_norm
from raycomp.pruning.search.space import Ratios, SearchSpace
from raycomp.speedup import ModelSpeedup, cut_calibration

_CLOSE = 0.01
_TOLERATED = 0.03
_MOST_TRIALS = 10
_RUNS = 40


@dataclass(frozen=True)
class Timed:
    """What was found for a budget of latency.

    Args:
        macs: the part of the multiply-accumulates.
        latency: what takes, cut to it, as a part of the model's.
        wanted: the budget, likewise.
    """

    macs: float
    latency: float
    wanted: float

    @property
    def told(self) -> str:
        """What the user should know of it."""
        if self.latency > self.wanted * (1 + _TOLERATED):
            return f"a latency of {self.wanted:.3f} can't be met: all that may go leaves {self.latency:.3f}"
        return f"a latency of {self.wanted:.3f} is {self.macs:.3f} of the MACs, timed {self.latency:.3f}"


def timed_budgets(job: JobConfig, index: int) -> list[int]:
    """The places of a stage's compressors that have a budget of latency."""
    found = []
    for place, settings in enumerate(job.stages[index].compressors):
        holder = getattr(settings, "pruner", settings)
        entries = getattr(holder, "config_list", ())
        if any(getattr(entry, "budget", None) is not None and entry.budget.is_timed for entry in entries):
            found.append(place)
    return found


def within_latency(
    job: JobConfig,
    index: int,
    place: int,
    task: Task,
    start: StageStart,
    resolved: ResolvedStage,
    found: Ratios | None = None,
    known: Timed | None = None,
) -> tuple[ResolvedStage, Timed]:
    """The stage with a part of the multiply-accumulates in place of a compressor's budget of latency.

    Args:
        job: the job.
        index: the stage's.
        place: the compressor's.
        task: the user's.
        start: what the stages before left.
        resolved: what the stage's config lists mean for that model.
        found: what a search found that each unit of the compressor's targets loses: all parts are moved alike until
            the latency is met.
        known: what was timed before, and isn't timed again.
    """
    torch.set_num_threads(job.scaling.threads_per_worker)
    study = _Study(job, index, place, task, start, resolved, found)
    timed = known or study.search()
    selections = list(resolved.selections)
    selections[place] = study.selection_at(timed.macs)
    return ResolvedStage(tuple(selections)), timed


class _Study:
    """Cuts and times one stage's model."""

    def __init__(
        self,
        job: JobConfig,
        index: int,
        place: int,
        task: Task,
        start: StageStart,
        resolved: ResolvedStage,
        found: Ratios | None,
    ) -> None:
        self.job, self.found = job, found
        self.selection = resolved.selections[place]
        self.chain: Chain = stage_chain(job, index, task, start, resolved)
        self.pruner = pruner_at(self.chain, place)
        self.last = index == len(job.stages) - 1
        self.example = real_inputs(task, torch.float32, 2)
        self.dense = detached_copy(self.chain.model).float().eval()
        self.budget = next(
            item.settings.budget
            for item in self.selection.selected.values()
            if isinstance(item.settings, PruneTarget) and item.settings.budget is not None
        )

    def search(self) -> Timed:
        """Narrows the part down, by where a straight line between the ends would be."""
        low, high = (0.02, self.part(0.02)), (1.0, 1.0)
        wanted = self.wanted(self.dense_s)
        if low[1] > wanted:
            return Timed(low[0], low[1], wanted)
        best = low
        for _ in range(_MOST_TRIALS):
            slope = (high[1] - low[1]) / (high[0] - low[0])
            macs = low[0] + (wanted - low[1]) / max(slope, 1e-9)
            # Towards the middle, where noise or a bend would leave the line at an end.
            macs = min(max(macs, low[0] + (high[0] - low[0]) / 8), high[0] - (high[0] - low[0]) / 8)
            here = (macs, self.part(macs))
            best = min(best, here, key=lambda each: abs(each[1] - wanted))
            if abs(here[1] / wanted - 1) < _CLOSE:
                break
            low, high = (here, high) if here[1] < wanted else (low, here)
        return Timed(best[0], best[1], wanted)

    def wanted(self, dense_s: float) -> float:
        """The budget as a part of what the model takes."""
        if self.budget.latency is not None:
            return self.budget.latency
        assert self.budget.latency_ms is not None
        return min(self.budget.latency_ms / 1000 / dense_s, 1.0)

    def selection_at(self, macs: float) -> Selection:
        """What the pruner prunes by, where a part of the multiply-accumulates stays."""
        selection = by_macs(self.selection, macs)
        if self.found is None:
            return selection
        self.pruner.choose(selection)
        space = SearchSpace(self.pruner)
        return space.chosen(space.fitted(self.found))

    def part(self, macs: float) -> float:
        """What the model takes, cut to a part of its multiply-accumulates, as a part of what it takes uncut."""
        self.pruner.choose(self.selection_at(macs))
        for mask in self.pruner.masks.values():
            mask.set_(torch.ones_like(mask.mask))
        self.pruner.set_masks({key: self._stand_in(key) for key in self.pruner.goals}, 1.0)
        self.pruner.follow()
        speedup = ModelSpeedup(self.dense, self.example, self.chain.masks(), exact=self.job.speedup.exact)
        smaller = speedup.speedup_model().eval()
        with TemporaryDirectory() as folder:
            if self.job.wants_int8 and self.last:
                calibration = cut_calibration(blank_calibration(self.chain), speedup.plan)
                int8 = lower_int8(smaller, calibration, self.chain.folds(), self.example)
                pruned: nn.Module = int8.as_module(threads=1)
            else:
                pruned = self._runnable(smaller, Path(folder) / "pruned.onnx")
            size = self.job.evaluation.latency_batch_size
            found = latencies_s({"dense": self._dense_form, "pruned": pruned}, self.example, size, _RUNS, threads=1)
        self.dense_s = found["dense"]
        return found["pruned"] / found["dense"]

    @cached_property
    def _dense_form(self) -> nn.Module:
        """What every trial is timed beside."""
        with TemporaryDirectory() as folder:
            return self._runnable(self.dense, Path(folder) / "dense.onnx")

    def _runnable(self, model: nn.Module, path: Path) -> nn.Module:
        export_onnx(model, self.example, path)
        return load_onnx(path, threads=1)

    def _stand_in(self, target_id: TargetId) -> torch.Tensor:
        """The norm of the weights as they are: what a pruner ranks by is known in training alone."""
        if self.pruner.layouts[target_id].is_parameter:
            weight = self.chain.space.parameter(target_id).detach()
            return l2_norm(weight, self.pruner.blocks(target_id))
        grid = torch.Size(self.pruner.grid(target_id))
        return torch.arange(grid.numel()).float().view(grid)
