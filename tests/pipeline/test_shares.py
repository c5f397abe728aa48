"""A mean over a global batch weighs what it is a mean of: samples, tokens, positions; on any number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from raycomp import Task
from raycomp.core.batch_share import BatchShare, use_share
from raycomp.core.target import TargetId
from raycomp.core.watching import watch
from raycomp.distillation.losses import kl, mse
from raycomp.errors import TaskError
from raycomp.pipeline.build import dense_model
from raycomp.pipeline.data.batches import open_batches
from raycomp.pipeline.data.plan import BatchPlan, MicroBatch
from raycomp.pipeline.training.shares import weighted_shares
from raycomp.quantization.range_watcher import RangeWatcher
from tests.contracts.training import train, weights_of
from tests.pipeline.ranks import on_ranks

VOCABULARY, PAD = 11, 0


class Sentences(Dataset[Any]):
    """Token sequences of 1 to 9 tokens, and one whose labels are all passed over."""

    def __init__(self, count: int = 13) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = [
            torch.randint(1, VOCABULARY, (1 + index * 5 % 9,), generator=generator) for index in range(count)
        ]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[index]
        labels = torch.full_like(tokens, -100) if index == 4 else (tokens * 3) % VOCABULARY
        return tokens, labels


class Reader(nn.Module):
    """Reads each token with its place; padding is seen by nothing but itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(VOCABULARY, 6), nn.Embedding(16, 6)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = self.places(torch.arange(input_ids.shape[1]))
        return self.head(torch.relu(self.hidden(self.embedding(input_ids) + places)))


class Text(Task):
    """Labels each token; a batch is as long as its longest sentence on this worker."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Reader()

    def teacher(self) -> nn.Module:
        torch.manual_seed(1)
        return Reader()

    def train_data(self) -> Any:
        return Sentences()

    def eval_data(self) -> Any:
        return Sentences(5)

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        length = max(len(tokens) for tokens, _ in samples)
        pad = lambda value, fill: functional.pad(value, (0, length - len(value)), value=fill)  # noqa: E731
        tokens = torch.stack([pad(tokens, PAD) for tokens, _ in samples])
        return {
            "input_ids": tokens,
            "attention_mask": (tokens != PAD).long(),
            "labels": torch.stack([pad(labels, -100) for _, labels in samples]),
        }

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return functional.cross_entropy(output.transpose(1, 2), batch["labels"])

    def metrics(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"length": batch["attention_mask"].sum(1).double()}

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.1)


JOB = {
    "name": "text",
    "task": {"entrypoint": f"{__name__}:Text"},
    "stages": [
        {
            "name": "fused",
            "compressors": [
                {
                    "type": "TaylorPruner",
                    "training_steps": 3,
                    "config_list": [{"op_names": ["hidden"], "sparse_ratio": 0.5}],
                },
                {
                    "type": "QATQuantizer",
                    "config_list": [{"op_names": ["head"], "target_names": ["_input_", "_output_", "weight"]}],
                },
                {
                    "type": "DynamicLayerwiseDistiller",
                    "config_list": [
                        {"op_names": ["head"], "apply_method": "kl"},
                        {"op_names": ["hidden"], "apply_method": "mse"},
                    ],
                },
            ],
        }
    ],
    "training": {"global_batch_size": 6, "steps": 6, "precision": "float64"},
}


def _trained(rank: int, world: int, accumulation: int = 1) -> dict[str, Any]:
    raw = {**JOB, "training": {**JOB["training"], "gradient_accumulation": accumulation}}  # type: ignore[dict-item]
    return weights_of(train(raw))


def test_a_text_job_is_the_same_on_any_number_of_workers() -> None:
    """Sentences differ in length, batches in padding, labels in how many count; one worker's batch may have none."""
    expected = _trained(0, 1)
    for world in (2, 3):
        for found in on_ranks(world, _trained):
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_text_job_is_the_same_in_micro_batches() -> None:
    expected, found = _trained(0, 1), _trained(0, 1, accumulation=3)
    for name, value in expected.items():
        if "tracked" not in name:
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def shares_of(task: Task, *batches: Any) -> list[BatchShare]:
    parts = [MicroBatch(batch, BatchShare(task.count_samples(batch), task.count_samples(batch))) for batch in batches]
    return weighted_shares(task, parts)


def test_weights_are_parts_of_samples_items_and_positions() -> None:
    task, data = Text(), Sentences()
    first, second = task.collate([data[0], data[1]]), task.collate([data[2], data[3], data[4]])
    # 1 + 6 and 2 + 7 + 3 tokens, the last three without labels.
    weights = [(s.loss_weight, s.sample_weight, s.position_weight) for s in shares_of(task, first, second)]
    assert weights == [pytest.approx((7 / 16, 2 / 5, 7 / 19)), pytest.approx((9 / 16, 3 / 5, 12 / 19))]


@pytest.mark.parametrize(
    ("batch", "items"),
    [
        ((torch.zeros(4, 3), torch.tensor([0, 1, -100, 2])), 3),
        ((torch.zeros(4, 3), torch.zeros(4, 5)), 4),
        ((torch.zeros(2, 3, 4), torch.tensor([[0, 1, -100, 2], [-100, -100, 1, 1]])), 5),
        ({"pixel_values": torch.zeros(3, 2), "labels": torch.tensor([1, 1, 0])}, 3),
        ({"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}, 4),
        ({"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 4), "labels": torch.tensor([0, 1])}, 2),
        ({"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 4), "labels": torch.rand(2)}, 2),
        ({"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 4), "labels": torch.rand(2, 3)}, 2),
        (
            {
                "input_ids": torch.ones(2, 4),
                "attention_mask": torch.ones(2, 4),
                "start_positions": torch.tensor([0, 1]),
                "end_positions": torch.tensor([1, 1]),
            },
            2,
        ),
        (torch.zeros(7, 2), 7),
    ],
)
def test_the_default_counts_what_a_loss_is_the_mean_of(batch: Any, items: int) -> None:
    assert Task().loss_items(batch) == items


def test_another_label_to_pass_over() -> None:
    task = Task()
    task.ignore_index = 0
    batch = (torch.zeros(2, 3), torch.tensor([[0, 1, 2], [0, 0, 4]]))
    assert task.loss_items(batch) == 3
    logits = torch.randn(2, 5, 3)
    assert task.loss(logits, batch) == functional.cross_entropy(logits, batch[1], ignore_index=0)


def test_a_causal_language_models_first_labels_are_in_no_loss() -> None:
    transformers = pytest.importorskip("transformers")

    class Causal(Task):
        def model(self) -> nn.Module:
            sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 16}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False)).eval()

    task = Causal()
    model = dense_model(task, 0)
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    batch = {"input_ids": labels.clamp(min=0), "labels": labels}
    logits = task.forward(model, batch).logits
    each = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    assert task.loss_items(batch) == 4
    assert torch.isclose(task.loss(task.forward(model, batch), batch), each.sum() / 4)


@pytest.mark.parametrize("items", [-1, float("nan"), "three"])
def test_a_count_that_is_none_is_an_error(items: Any) -> None:
    class Wrong(Task):
        def loss_items(self, batch: Any) -> Any:
            return items

    with pytest.raises(TaskError, match="loss_items"):
        shares_of(Wrong(), torch.zeros(2, 2))


@pytest.mark.parametrize("distance", [kl, mse])
def test_distances_are_means_over_positions_that_count(distance: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 7, generator=generator)
    counted = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    rows = [distance(student[i, j][None], teacher[i, j][None]) for i, j in counted.nonzero().tolist()]
    assert torch.isclose(distance(student, teacher, counted), torch.stack(rows).mean())
    assert torch.isclose(distance(student, teacher), distance(student, teacher, torch.ones(2, 5, dtype=torch.bool)))
    assert distance(student, teacher, torch.zeros(2, 5, dtype=torch.bool)) == 0


def test_kl_does_not_grow_with_the_length() -> None:
    of_length = [kl(torch.arange(10.0).expand(4, n, 10), torch.zeros(4, n, 10)) for n in (1, 64)]
    assert torch.isclose(*of_length)


class Loud(Text):
    """What stands in for padding is far from all words."""

    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            model.embedding.weight[PAD] = 1e3  # type: ignore[union-attr, operator, index]
        return model


def test_padding_widens_no_range() -> None:
    tracked = []
    for task in ("Text", "Loud"):
        quantizer = train({**JOB, "task": {"entrypoint": f"{__name__}:{task}"}}).members[1]
        tracked.append(quantizer.quantizers[TargetId("head", "_output_0")].tracked_max)  # type: ignore[attr-defined]
    assert tracked[0] == tracked[1]


def test_a_rank_weighs_the_loss_of_its_samples_alone() -> None:
    """Image jobs weigh as before: 5 samples in micro-batches of 3 and 2."""
    data = torch.utils.data.TensorDataset(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))
    (step,) = open_batches(Task(), data, BatchPlan(5, accumulation=2)).iterate(0)
    assert [share.loss_weight for share in weighted_shares(Task(), step)] == [3 / 5, 2 / 5]


def test_an_encoder_decoders_labels_are_not_shifted() -> None:
    transformers = pytest.importorskip("transformers")

    class Translating(Task):
        def model(self) -> nn.Module:
            sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
            return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))

    task = Translating()
    dense_model(task, 0)
    assert task.loss_items({"labels": torch.ones(3, 4, dtype=torch.long)}) == 12


class OwnMean(Text):
    """Its loss is a mean that is 0/0, with such gradients, where nothing is labelled."""

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        each = functional.cross_entropy(output.transpose(1, 2), batch["labels"], reduction="none")
        counted = (batch["labels"] != -100).to(each.dtype)
        return (each * counted).sum() / counted.sum()


def _own_mean(rank: int, world: int, accumulation: int = 1) -> dict[str, Any]:
    training = {**JOB["training"], "global_batch_size": 3, "gradient_accumulation": accumulation}  # type: ignore[dict-item]
    return weights_of(train({**JOB, "task": {"entrypoint": f"{__name__}:OwnMean"}, "training": training}))


def test_a_rank_or_micro_batch_without_any_label_adds_nothing() -> None:
    expected = _own_mean(0, 1)
    ranks = on_ranks(3, _own_mean)
    for name, value in expected.items():
        np.testing.assert_allclose(ranks[0][name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        if "tracked" not in name:
            np.testing.assert_allclose(_own_mean(0, 1, 3)[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
            break


def test_a_count_may_be_a_sum_of_weights() -> None:
    class Weighted(Task):
        def loss_items(self, batch: Any) -> float:
            return float(batch.sum())

    weights = [share.loss_weight for share in shares_of(Weighted(), torch.tensor([[0.25]]), torch.tensor([[0.5]]))]
    assert weights == pytest.approx([1 / 3, 2 / 3])


def test_a_batch_of_nothing_but_padding_is_watched_by_nobody() -> None:
    watcher = RangeWatcher("a")
    share = BatchShare(1, 2, positions=torch.zeros(1, 3, dtype=torch.bool))
    with watch("training"), use_share(share):
        watcher(torch.randn(1, 3, 4))
    assert watcher.low == torch.inf


def test_kl_passes_over_what_the_teacher_rules_out() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert float(kl(logits, logits)) == pytest.approx(0, abs=1e-6)
    student = torch.zeros(1, 3, requires_grad=True)
    kl(student, logits).backward()
    assert bool(student.grad.isfinite().all())  # type: ignore[union-attr]
