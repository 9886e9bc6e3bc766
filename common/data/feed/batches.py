"""The iterator that training reads its batches from."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.data.sources.base import Source


class Batches:
    """Iterator over batches, with its position in the data.

    Attributes:
        steps_per_epoch: full batches in an epoch.
        position: of the next batch in the data, `start_step` of a continuation; equals the training
          step, except after a run went on in another order.
        readers: how many processes share a streamed set, whose order depends on it; else 0.
        corrupt_count: corrupt images replaced so far.
    """

    def __init__(
        self, batches: Iterator[dict], source: Source, steps: int, position: int, readers: int
    ):
        self._batches, self._source = batches, source
        self.steps_per_epoch, self.position, self.readers = steps, position, readers

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        self.position += 1
        return batch

    def take(self, steps: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The ids `[steps, b_local]` and what the program of the next steps takes; here 1 step."""
        batch = next(self)
        return batch.pop("ids")[None], batch

    @property
    def corrupt_count(self) -> int:
        """Images that were replaced so far."""
        return self._source.corrupt_count
