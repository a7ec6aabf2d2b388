"""The search for documents of equal text by hashes of 128 bits, which two different documents practically never share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


def hash_of(text: str) -> bytes:
    """Return the BLAKE2b hash of a text, 16 bytes."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=HASH_BYTES).digest()


@dataclass(frozen=True, slots=True)
class _Run:
    """Sorted hashes as two columns. NumPy would copy a column of a joint array before it searches."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]

    def contains(self, items: NDArray[np.void]) -> NDArray[np.bool_]:
        """Return which items are among the hashes, bool [n].

        The search compares the first words of the hashes; the few entries that share a first word are compared one after the other.
        """
        place = np.searchsorted(self.high, items["high"])
        found = np.zeros(len(items), dtype=bool)
        left = np.arange(len(items))
        while len(left):
            left = left[place[left] < len(self.high)]
            left = left[self.high[place[left]] == items["high"][left]]
            found[left] |= self.low[place[left]] == items["low"][left]
            left = left[~found[left]]
            place[left] += 1
        return found

    def joined(self, other: _Run) -> _Run:
        high, low = np.concatenate([self.high, other.high]), np.concatenate([self.low, other.low])
        order = np.lexsort((low, high))
        return _Run(high[order], low[order])


class SeenHashes:
    """A set of hashes that grows by batches. It takes 16 bytes per entry, and up to three times as many while it joins parts.

    The set consists of sorted runs, each at least twice as long as the next, so that n entries are in at most log2(n) runs.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def add(self, hashes: bytes) -> NDArray[np.bool_]:
        """Add n hashes to the set.

        Returns:
            bool [n]: True for each hash that is new: it is not in the set, and is not earlier among these hashes.
        """
        batch = np.frombuffer(hashes, dtype=_HASH)
        unique, first = np.unique(batch, return_index=True)
        known = np.zeros(len(unique), dtype=bool)
        for run in self._runs:
            known |= run.contains(unique)
        is_new = np.zeros(len(batch), dtype=bool)
        is_new[first[~known]] = True
        if not known.all():
            self._insert(_Run(unique["high"][~known], unique["low"][~known]))
        return is_new

    def _insert(self, run: _Run) -> None:
        while self._runs and len(self._runs[-1].high) < 2 * len(run.high):
            run = run.joined(self._runs.pop())
        self._runs.append(run)
