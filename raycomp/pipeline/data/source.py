"""What reading data needs to know of a task."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Generator


class SampleSource(Protocol):
    """How samples become batches: a `Task`, seen from where its data are read."""

    def collate(self, samples: list[Any]) -> Any:
        """A batch of samples."""

    def augment(self, sample: Any, generator: Generator) -> Any:
        """A training sample, changed at random."""

    def count_samples(self, batch: Any) -> int:
        """The number of samples in a batch."""

    def overrides(self, method: str) -> bool:
        """Whether the user's class brings its own `method`."""
