"""The samples of a run whose stages may have texts of their own, in one global order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from w1train.data.packing import PackedDataset


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive samples of the global order from one dataset."""

    first: int
    """Global index of the first of them."""
    prefix: str
    """The dataset."""
    offset: int
    """Which of the dataset's samples the first one is."""
    repeats: int
    """How often each comes in a row: 2 for the pairs of complementary masking."""


def stretches(stages: Sequence[tuple[int, str, int]]) -> list[Stretch]:
    """Lay stages, each (first global sample, dataset, repeats), over their datasets: one that is used again is read on."""
    found: list[Stretch] = []
    used: dict[str, int] = {}
    ends = [first for first, _, _ in stages[1:]] + [stages[-1][0]]
    for (first, prefix, repeats), end in zip(stages, ends, strict=True):
        found.append(Stretch(first, prefix, used.get(prefix, 0), repeats))
        used[prefix] = used.get(prefix, 0) + -(-(end - first) // repeats)
    return found


class StagedSamples:
    """``PackedDataset`` for the batch loader, whatever dataset a sample comes from."""

    def __init__(self, parts: Sequence[Stretch], datasets: dict[str, PackedDataset]) -> None:
        self.parts, self.datasets = list(parts), datasets
        (self.sequence_length,) = {dataset.sequence_length for dataset in datasets.values()}
        self._firsts = [part.first for part in self.parts]

    def part(self, global_index: int) -> Stretch:
        """The stretch that a sample belongs to (the last of those without a sample between them)."""
        return self.parts[bisect_right(self._firsts, global_index) - 1]

    def sample(self, global_index: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """As ``PackedDataset.sample``."""
        return self.datasets[self.part(global_index).prefix].sample(self._local_index(global_index))

    def epoch(self, num_samples: int) -> float:
        """Passes through the present dataset after ``num_samples`` of the run."""
        last = max(num_samples - 1, 0)
        dataset = self.datasets[self.part(last).prefix]
        return (self._local_index(last) + (num_samples > 0)) / dataset.num_samples_per_epoch

    def _local_index(self, global_index: int) -> int:
        part = self.part(global_index)
        return part.offset + (global_index - part.first) // part.repeats
