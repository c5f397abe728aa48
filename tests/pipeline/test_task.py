from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from raycomp.errors import TaskError
from raycomp.pipeline.data.plan import LoaderContext
from raycomp.pipeline.data.structure import count_samples, move_batch
from raycomp.pipeline.task import Task, data_made_once, given_data, prepare_task
from tests.pipeline.ranks import on_ranks

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
TARGET = torch.tensor([0, 0, 1, 0])


def test_pairs_are_classified_by_default() -> None:
    task, batch = Task(), [LOGITS, TARGET]
    output = task.forward(nn.Identity(), batch)
    assert output is LOGITS
    expected = -torch.log_softmax(LOGITS, 1)[torch.arange(4), TARGET].mean()
    assert torch.isclose(task.loss(output, batch), expected)
    assert torch.isclose(task.training_step(nn.Identity(), batch), expected)
    assert task.metrics(output, batch)["accuracy"].tolist() == [1.0, 0.0, 1.0, 1.0]


def test_dense_predictions_have_a_loss_but_no_default_metric() -> None:
    logits, target = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    picked = torch.log_softmax(logits, 1).gather(1, target[:, None])
    assert torch.isclose(Task().loss(logits, [logits, target]), -picked.mean())
    with pytest.raises(TaskError, match="define metrics in the task"):
        Task().metrics(logits, [logits, target])


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.zeros(4, 1), torch.zeros(4, 1)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 2), torch.zeros(4, dtype=torch.bool)),
        (SimpleNamespace(boxes=1), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_what_is_no_classification_asks_for_a_loss(output: Any, target: Tensor) -> None:
    with pytest.raises(TaskError, match=r"^Regression: the default loss\(\).*\(define loss in the task\)"):
        type("Regression", (Task,), {})().loss(output, [None, target])


class Scorer(nn.Module):
    """A model as Hugging Face writes them: arguments by name, its own loss where it is given labels."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        output = {"logits": pixel_values}
        return output if labels is None else {"loss": torch.tensor(7.0), **output}


class Plain(nn.Module):
    def forward(self, pixel_values: Tensor, **options: Any) -> Tensor:
        assert not options
        return pixel_values


def test_mappings_are_passed_by_name_and_labels_to_models_that_take_them() -> None:
    task, batch = Task(), {"pixel_values": LOGITS, "labels": TARGET}
    output = task.forward(Scorer(), batch)
    assert task.loss(output, batch) == 7.0
    assert task.metrics(output, batch)["accuracy"].mean() == 0.75
    assert task.forward(Plain(), batch) is LOGITS
    assert task.inputs(batch) == ((), {"pixel_values": LOGITS})
    without = {"pixel_values": LOGITS}
    assert "loss" not in task.forward(Scorer(), without)
    with pytest.raises(TaskError, match="define target in the task"):
        task.target(without)


def _labels_through_ddp(rank: int, world: int) -> float:
    model = Scorer()
    model.scale = nn.Parameter(torch.ones(()))
    return float(Task().forward(DistributedDataParallel(model), {"pixel_values": LOGITS, "labels": TARGET})["loss"])


def test_labels_reach_a_model_under_ddp() -> None:
    assert on_ranks(2, _labels_through_ddp) == [7.0, 7.0]


def test_example_inputs_are_the_first_two_samples() -> None:
    class Pairs(Task):
        def train_data(self) -> Any:
            return TensorDataset(LOGITS, TARGET)

    class Triples(Task):
        def train_data(self) -> Any:
            return TensorDataset(LOGITS, LOGITS + 1, TARGET)

    class Mappings(Task):
        def train_data(self) -> Any:
            return [{"pixel_values": row, "labels": label} for row, label in zip(LOGITS, TARGET, strict=True)]

    class Loader(Task):
        def train_data(self) -> Any:
            def loader(context: LoaderContext) -> Iterator[list[Tensor]]:
                yield [LOGITS[: context.batch_size], TARGET[: context.batch_size]]

            return loader

    pair, triple, mapping = Pairs().example_input(), Triples().example_input(), Mappings().example_input()
    assert isinstance(pair, Tensor)
    assert torch.equal(pair, LOGITS[:2])
    assert isinstance(triple, tuple)
    assert torch.equal(triple[1], LOGITS[:2] + 1)
    assert isinstance(mapping, dict)
    assert list(mapping) == ["pixel_values"]
    assert torch.equal(mapping["pixel_values"], LOGITS[:2])
    assert torch.equal(Loader().example_input(), LOGITS[:2])  # type: ignore[arg-type]


def test_what_is_required_is_asked_for() -> None:
    for method in ("model", "train_data", "eval_data"):
        with pytest.raises(TaskError, match=rf"^Task: the task has no {method}\(\)"):
            getattr(Task(), method)()


def test_only_what_learns_is_optimized() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = Task().optimizer(model).param_groups
    assert group["params"] == [model.weight]
    assert (group["lr"], Task().teacher(), Task().scheduler(Task().optimizer(model), 10)) == (1e-3, None, None)


def test_prepared_files_are_found_and_missing_ones_named(tmp_path: Path) -> None:
    class Prepared(Task):
        def prepare(self, folder: Path) -> None:
            (folder / "teacher.txt").write_text("wise")

    task = Prepared()
    with pytest.raises(TaskError, match=r"'teacher.txt' has not been prepared.*prepare_task"):
        task.prepared_file("teacher.txt")
    prepare_task(task, tmp_path / "new" / "folder")
    assert task.prepared_file("teacher.txt").read_text() == "wise"
    with pytest.raises(TaskError, match=r"'other\.txt' has not been prepared"):
        task.prepared_file("other.txt")


def test_a_task_knows_what_it_brings_itself() -> None:
    class Own(Task):
        def augment(self, sample: Any, generator: torch.Generator) -> Any:
            return sample

    assert Own().overrides("augment")
    assert not Own().overrides("collate")


def test_every_public_method_of_a_task_is_documented() -> None:
    for name, method in inspect.getmembers(Task, inspect.isfunction):
        assert name.startswith("_") or inspect.getdoc(method), name


class Point(NamedTuple):
    x: Tensor
    name: str


def test_batches_of_any_form_are_moved_and_counted() -> None:
    batch = {"points": [Point(torch.zeros(3, 2), "a")], "ids": torch.arange(3), "scale": torch.tensor(1.0)}
    moved = move_batch(batch, "cpu", torch.float64)
    assert isinstance(moved["points"][0], Point)
    assert moved["points"][0].x.dtype == moved["scale"].dtype == torch.float64
    assert moved["ids"].dtype == torch.int64
    assert moved["points"][0].name == "a"
    assert move_batch(batch, "cpu")["points"][0].x.dtype == torch.float32
    assert count_samples(batch) == 3
    assert count_samples([torch.tensor(1.0), "text", torch.zeros(5)]) == 5
    with pytest.raises(TaskError, match="define count_samples"):
        Task().count_samples(["text", 1])


class OfLength(Task):
    def __init__(self, length: int) -> None:
        self.length = length

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.zeros(self.length))


def test_data_that_are_made_once_are_those_of_their_own_task() -> None:
    with data_made_once():
        # Python gives the second task the place, and the id, of the first.
        assert [len(given_data(OfLength(length), "train")) for length in (1, 2, 3)] == [1, 2, 3]
