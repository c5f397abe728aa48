"""Reading samples: at once from tensors, one by one from other datasets, with randomness that belongs to the sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from raycomp.core.seeds import derived_seed, restored_generators, seed_generators
from raycomp.errors import TaskError
from raycomp.pipeline.data.source import SampleSource
from raycomp.pipeline.user_code import user_code


def fetched_batches(
    task: SampleSource,
    dataset: Any,
    wanted: Sequence[Tensor],
    seed: int,
    epoch: int,
    *,
    augment: bool = True,
    num_data_workers: int = 0,
) -> Iterator[Any]:
    """A collated batch for each tensor of indices in `wanted`, in this order.

    What a dataset draws from the global random generators (torch's, Python's, NumPy's) while it gives a sample, and
    what `task.augment` draws from its own, depends on seed, epoch and the sample's index alone. What `task.collate`
    draws depends on seed, epoch and the samples of the batch, so on the number of workers, too.

    Raises:
        TaskError: the dataset, augment or collate raises.
    """
    fetcher = _Fetcher(task, dataset, seed, epoch, augment)
    if num_data_workers == 0:
        return _until_failure(map(fetcher.__getitem__, wanted))
    loader = DataLoader(
        fetcher,
        batch_size=None,
        sampler=wanted,  # type: ignore[arg-type]
        num_workers=num_data_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(derived_seed(seed, epoch)),
    )
    return _until_failure(iter(loader))


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a loading process; torch would wrap a raised one in a whole traceback."""

    error: TaskError


def _until_failure(batches: Iterator[Any]) -> Iterator[Any]:
    failure = None
    for batch in batches:
        if isinstance(batch, _Failure):
            failure = batch.error
            break
        yield batch
    # Otherwise the error's traceback keeps loading processes, whose end the garbage collector would then wait 5 s for.
    del batches
    if failure is not None:
        raise failure


def _as_it_is(batch: Any) -> Any:
    return batch


class _Fetcher(Dataset[Any]):
    """Maps a tensor of indices to a batch."""

    def __init__(self, task: SampleSource, dataset: Any, seed: int, epoch: int, augment: bool) -> None:
        self._task = task
        self._dataset, self._origin = _without_subsets(dataset)
        self._seed = seed
        self._epoch = epoch
        self._augments = augment and task.overrides("augment")
        self._by_batch = type(self._dataset) is TensorDataset and not self._augments and not task.overrides("collate")

    def __getitem__(self, indices: Tensor) -> Any:
        if self._by_batch:
            positions = indices if self._origin is None else self._origin[indices]
            return [tensor[positions] for tensor in self._dataset.tensors]
        try:
            return self._collated(indices.tolist())
        except TaskError as error:
            return _Failure(error)

    def _collated(self, indices: list[int]) -> Any:
        name = type(self._task).__name__
        with restored_generators():
            samples = [self._sample(index, name) for index in indices]
            seed_generators(derived_seed(self._seed, self._epoch, *indices))
            with user_code(f"{name}.collate()"):
                return self._task.collate(samples)

    def _sample(self, index: int, name: str) -> Any:
        seed = derived_seed(self._seed, self._epoch, index)
        seed_generators(seed)
        position = index if self._origin is None else int(self._origin[index])
        with user_code(f"sample {index} of {name}'s data"):
            sample = self._dataset[position]
        if not self._augments:
            return sample
        with user_code(f"{name}.augment()"):
            return self._task.augment(sample, torch.Generator().manual_seed(derived_seed(seed, 1)))


def _without_subsets(dataset: Any) -> tuple[Any, Tensor | None]:
    """The dataset under plain `Subset`s, and where in it each index lies (None: at the index itself)."""
    origin = None
    while type(dataset) is Subset:
        indices = torch.as_tensor(dataset.indices)
        origin = indices if origin is None else indices[origin]
        dataset = dataset.dataset
    return dataset, origin
