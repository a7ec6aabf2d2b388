"""The corpus of each sample of a blend, which is computed from the sample's index without random draws or tables."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class _Fork:
    """Two groups of corpora that share some samples."""

    weight: int
    heavy: _Fork | str
    light: _Fork | str
    heavy_weight: int

    def num_heavy(self, num: int) -> int:
        """Return how many of the first ``num`` samples go to the heavy side: its share, rounded to the nearest integer."""
        return (2 * num * self.heavy_weight + self.weight) // (2 * self.weight)


class Interleave:
    """A rule that deals samples 0, 1, 2, ... to corpora in proportion to their weights.

    The corpora are the leaves of a Huffman tree of their weights. Each fork deals its samples to its two sides, by rounding the heavy
    side's share. After any number of samples, a corpus of weight w has its exact share to within 1/2 (1 + w / W_1 + w / W_2 + ...), where
    W_k are the weights of its ancestors below the root. This bound is 1/2 for two corpora, and below 1.7 for any weights, because in a
    Huffman tree the W_k grow like the Fibonacci numbers. With random draws the difference would grow like the square root of the number of
    samples.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Accept the weights by name. A corpus of weight 0 gets no sample, and at least one weight must be positive."""
        self.names = [name for name, weight in weights.items() if weight > 0]
        assert self.names, weights
        self._root = _tree(_integers({name: weights[name] for name in self.names}))

    def locate(self, index: int) -> tuple[str, int]:
        """Return the corpus of sample ``index``, and how many samples of this corpus precede it."""
        node = self._root
        while isinstance(node, _Fork):
            before = node.num_heavy(index)
            if node.num_heavy(index + 1) > before:
                node, index = node.heavy, before
            else:
                node, index = node.light, index - before
        return node, index

    def counts(self, num: int) -> dict[str, int]:
        """Return how many of the first ``num`` samples come from each corpus."""
        found: dict[str, int] = {}
        pending: list[tuple[_Fork | str, int]] = [(self._root, num)]
        while pending:
            node, count = pending.pop()
            if isinstance(node, _Fork):
                heavy = node.num_heavy(count)
                pending += [(node.heavy, heavy), (node.light, count - heavy)]
            else:
                found[node] = count
        return {name: found[name] for name in self.names}


def _integers(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the weights times a factor that makes them integers, so that they and their sums are exact."""
    fractions = {name: Fraction(weight) for name, weight in weights.items()}
    factor = math.lcm(*(fraction.denominator for fraction in fractions.values()))
    return {name: int(fraction * factor) for name, fraction in fractions.items()}


def _tree(weights: Mapping[str, int]) -> _Fork | str:
    """Return the Huffman tree of the weights. Among equal weights the earlier weights are joined first."""
    heap: list[tuple[int, int, _Fork | str]] = [(weight, number, name) for number, (name, weight) in enumerate(weights.items())]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        light_weight, _, light = heapq.heappop(heap)
        heavy_weight, _, heavy = heapq.heappop(heap)
        heapq.heappush(heap, (light_weight + heavy_weight, number, _Fork(light_weight + heavy_weight, heavy, light, heavy_weight)))
        number += 1
    return heap[0][2]
