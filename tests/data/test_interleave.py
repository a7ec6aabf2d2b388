"""Blends: exact shares in every prefix and window, against plain counting."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slow import examples
from w1train.data.packed.interleave import Interleave

weights = st.lists(st.floats(1e-6, 1.0) | st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=1, max_size=12).filter(any)
BOUND = 1.7
"""1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + 1/8 + ...), from the reciprocals of Fibonacci's numbers."""


@settings(max_examples=examples(60))
@given(weights)
def test_shares_are_exact_in_every_prefix_and_window(values):
    named = {str(number): value for number, value in enumerate(values)}
    interleave = Interleave(named)
    order = [interleave.locate(index)[0] for index in range(300)]
    for name, weight in named.items():
        excess = np.cumsum([0, *(other == name for other in order)]) - np.arange(301) * weight / sum(values)
        assert abs(excess).max() < BOUND
        assert excess.max() - excess.min() < 2 * BOUND, "the largest difference over any window"


@settings(max_examples=examples(60))
@given(weights, st.integers(0, 10**15))
def test_a_place_is_found_without_those_before_it(values, start):
    """At any index: the sample's number in its corpus is the count of the corpus before it."""
    interleave = Interleave({str(number): value for number, value in enumerate(values)})
    counts = interleave.counts(start)
    for index in range(start, start + 20):
        name, number = interleave.locate(index)
        assert number == counts[name]
        counts[name] += 1
    assert interleave.counts(start + 20) == counts
    assert sum(counts.values()) == start + 20


def test_two_equal_corpora_alternate():
    order = [Interleave({"a": 0.5, "b": 0.5}).locate(index)[0] for index in range(8)]
    assert order in (["a", "b"] * 4, ["b", "a"] * 4)


def test_a_corpus_without_weight_gets_nothing():
    interleave = Interleave({"a": 0.0, "b": 2.0})
    assert interleave.names == ["b"]
    assert [interleave.locate(index) for index in (0, 10**12)] == [("b", 0), ("b", 10**12)]
