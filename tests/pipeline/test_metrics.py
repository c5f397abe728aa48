from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset, TensorDataset

from raycomp.core.model import evaluation_mode
from raycomp.core.reduction import rank as own_rank
from raycomp.core.reduction import world_size
from raycomp.errors import TaskError
from raycomp.pipeline.data.plan import LoaderContext
from raycomp.pipeline.task import Task
from raycomp.pipeline.training.metrics import evaluate
from tests.pipeline.ranks import on_ranks


class Squares(Task):
    """The metrics of sample x are x² and whether the model was in eval mode."""

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch[0],), {}

    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]:
        return {"square": batch[0] ** 2, "output": output}


class Mode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 1.0 if self.training or self.inner.training else 2.0)


def data(length: int) -> TensorDataset:
    return TensorDataset(torch.arange(length, dtype=torch.float32))


def test_metrics_are_means_over_samples_and_not_batches() -> None:
    # 0 + 1 + 4 + 9 + 16 = 30 over 5 samples, in batches of 3 and 2.
    assert evaluate(Squares(), Mode(), data(5), batch_size=3) == {"square": 6.0, "output": 2.0}
    assert evaluate(Squares(), Mode(), data(5), batch_size=2, max_samples=3)["square"] == pytest.approx(5 / 3)


def test_every_module_is_afterwards_in_its_own_mode() -> None:
    frozen = Mode()
    model = nn.Sequential(Mode(), frozen)
    model.train()
    frozen.inner.eval()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, True, True, False]


def _evaluate(rank: int, world: int, length: int, max_samples: int | None) -> dict[str, float]:
    options: dict[str, Any] = {"batch_size": 2, "max_samples": max_samples, "rank": rank, "world": world}
    return evaluate(Squares(), DistributedDataParallel(Mode()), data(length), **options)


@pytest.mark.parametrize(("length", "max_samples"), [(7, None), (11, 8), (2, None)])
def test_workers_share_the_samples_out_and_agree(length: int, max_samples: int | None) -> None:
    expected = evaluate(Squares(), Mode(), data(length), batch_size=100, max_samples=max_samples)
    assert on_ranks(3, _evaluate, length, max_samples) == [expected] * 3


def _evaluate_loaders(rank: int, world: int, max_samples: int | None) -> dict[str, float]:
    def loader(context: LoaderContext) -> Iterator[list[Tensor]]:
        return ([part] for part in torch.arange(7.0)[1 - context.rank :: context.world].split(context.batch_size))

    options: dict[str, Any] = {"batch_size": 3, "max_samples": max_samples, "rank": rank, "world": world}
    return evaluate(Squares(), DistributedDataParallel(Mode()), loader, **options)


def test_loaders_are_merged_by_sample_counts() -> None:
    assert [found["square"] for found in on_ranks(2, _evaluate_loaders, None)] == [13.0, 13.0]
    # Three samples: 1 and 3 of the first worker, 0 of the second, which has more batches.
    assert [found["square"] for found in on_ranks(2, _evaluate_loaders, 3)] == [pytest.approx(10 / 3)] * 2


def _evaluate_alone(rank: int, world: int) -> dict[str, float]:
    model = DistributedDataParallel(Mode())
    return evaluate(Squares(), model, data(5), batch_size=2) if rank == 1 else {}


def test_a_worker_can_evaluate_alone() -> None:
    assert on_ranks(2, _evaluate_alone) == [{}, {"square": 6.0, "output": 2.0}]


def _starved(rank: int, world: int) -> dict[str, float]:
    batches = [[torch.full((2,), 3.0)]][rank:]
    return evaluate(Squares(), Mode(), lambda context: batches, batch_size=2, rank=rank, world=world)


def test_a_worker_with_nothing_to_evaluate_agrees_with_the_others() -> None:
    """Ray Data gives a worker nothing where there are fewer blocks than workers."""
    assert on_ranks(2, _starved) == [{"square": 9.0, "output": 2.0}] * 2


def _all_starved(rank: int, world: int) -> str:
    with pytest.raises(TaskError) as raised:
        evaluate(Squares(), Mode(), lambda context: [], batch_size=2, rank=rank, world=world)
    return str(raised.value)


def test_nothing_to_evaluate_on_any_worker_is_an_error_everywhere() -> None:
    assert all("there is nothing to evaluate" in message for message in on_ranks(2, _all_starved))


class Wrong(Squares):
    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]:
        return {"square": (batch[0] ** 2).mean()}


def test_a_metric_that_is_already_a_mean_is_refused() -> None:
    with pytest.raises(TaskError, match=r"metric 'square' is \[\] for a batch of 3 samples.*one value per sample"):
        evaluate(Wrong(), Mode(), data(3), batch_size=3)
    with pytest.raises(TaskError, match="nothing to evaluate"):
        evaluate(Squares(), Mode(), data(0), batch_size=3)


@pytest.mark.parametrize("method", ["forward", "metrics"])
def test_what_the_users_code_raises_is_named(method: str) -> None:
    def raises(*_: Any) -> Any:
        raise KeyError("broken")

    task = type("Broken", (Squares,), {method: raises})()
    with pytest.raises(TaskError, match=rf"Broken\.{method}\(\) raised KeyError"):
        evaluate(task, Mode(), data(3), batch_size=3)


def test_inputs_take_the_type_that_is_asked_for() -> None:
    class Types(Squares):
        def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]:
            return {"double": torch.full((len(output),), float(output.dtype == torch.float64))}

    assert evaluate(Types(), Mode(), data(3), batch_size=3, dtype=torch.float64) == {"double": 1.0}


class Numbered(IterableDataset[Any]):
    """0 to 10, each with its double."""

    def __iter__(self) -> Iterator[Any]:
        return ((torch.tensor([float(k)]), torch.tensor(0)) for k in range(11))


class Sums(Task):
    """Its metric is the sample itself."""

    def metrics(self, output: Any, batch: Any) -> dict[str, Tensor]:
        return {"value": batch[0][:, 0].double()}


def _streamed(rank: int, world: int, batch_size: int, most: int | None) -> dict[str, float]:
    return evaluate(
        Sums(), nn.Linear(1, 2), Numbered(), batch_size=batch_size, max_samples=most, rank=rank, world=world
    )


@pytest.mark.parametrize(("batch_size", "most", "mean"), [(2, None, 5.0), (3, 4, 1.5), (1, 1, 0.0)])
def test_every_sample_of_a_stream_counts_once(batch_size: int, most: int | None, mean: float) -> None:
    assert _streamed(0, 1, batch_size, most) == {"value": mean}
    assert on_ranks(3, _streamed, batch_size, most) == [{"value": mean}] * 3


class Selfish(Numbered):
    """Shares itself out."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), own_rank(), None, world_size())


def _selfish(rank: int, world: int) -> str:
    with pytest.raises(TaskError) as raised:
        evaluate(Sums(), nn.Linear(1, 2), Selfish(), batch_size=2, rank=rank, world=world)
    return str(raised.value)


def test_a_stream_that_shares_itself_out_is_refused_in_evaluation_too() -> None:
    assert all("gives one worker other samples than another" in message for message in on_ranks(2, _selfish))
