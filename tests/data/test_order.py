"""The keyed permutation: each item once, uniform, and the same for ever."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slow import examples
from w1train.data import order
from w1train.data.order import Stream, permuted, random_words


@pytest.fixture
def hashes_are_kept(monkeypatch):
    """Few items are found by many turns through a network whose halves have four bits: the same few hashes again and again."""
    monkeypatch.setattr(order, "_mix", lru_cache(maxsize=4096)(order._mix))


@settings(max_examples=examples(30))
@given(st.integers(1, 700), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_each_item_once(num_items, seed, epoch):
    assert sorted(permuted(place, num_items, seed, epoch) for place in range(num_items)) == list(range(num_items))


@pytest.mark.parametrize("num_items", [10**13, 2**43, 2**43 + 1])
def test_any_place_of_a_huge_order(num_items):
    """Distinct, inside, and on both sides of the middle equally often (binomial: four standard deviations)."""
    places = [*range(1000), *range(num_items - 1000, num_items)]
    items = [permuted(place, num_items, seed=1, epoch=2) for place in places]
    assert len(set(items)) == 2000
    assert all(0 <= item < num_items for item in items)
    assert abs(sum(item < num_items // 2 for item in items) - 1000) < 4 * 500**0.5


def test_the_order_is_pinned():
    """Changing it would silently change what a resumed run reads."""
    assert [permuted(place, 8, seed=1234, epoch=3) for place in range(8)] == [7, 6, 2, 1, 3, 5, 0, 4]
    assert [permuted(place, 10**13, seed=1234, epoch=3) for place in range(2)] == [2131578583093, 6368357855980]
    assert random_words(1234, 3, Stream.START, 1) == [18375297292529665263]


@pytest.mark.parametrize("num_items", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_every_item_is_as_likely_at_every_place(num_items):
    """Chi-squared of item against place. The bound is five standard deviations above the mean."""
    num_epochs, num_places = 30 * num_items, 6
    counts = np.zeros((num_places, num_items))
    for epoch in range(num_epochs):
        for place in range(num_places):
            counts[place, permuted(place * (num_items // num_places), num_items, seed=11, epoch=epoch)] += 1
    expected = num_epochs / num_items
    freedom = num_places * (num_items - 1)
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.slow
def test_the_shuffle_is_uniform(hashes_are_kept):
    """Chi-squared of item against place over 6,000 epochs, 25 degrees of freedom: above 60 has probability 1e-4."""
    counts = np.zeros((6, 6))
    for epoch in range(6000):
        counts[[permuted(place, 6, seed=99, epoch=epoch) for place in range(6)], np.arange(6)] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 60


@pytest.mark.slow
def test_all_orders_of_three_are_equally_likely(hashes_are_kept):
    counts = np.zeros(27)
    for seed in range(6000):
        counts[np.array([permuted(place, 3, seed, epoch=0) for place in range(3)]) @ (9, 3, 1)] += 1
    orders = counts[counts > 0]
    assert len(orders) == 6
    assert ((orders - 1000) ** 2 / 1000).sum() < 26  # 5 degrees of freedom: probability 1e-4


def test_what_follows_what_is_uniform():
    """Chi-squared of the step from an item to the next one, in 16 bins of a permutation of 2^16: a weak network has favourite steps."""
    num_items = 1 << 16
    items = np.array([permuted(place, num_items, seed=5, epoch=0) for place in range(1 << 14)])
    steps = np.bincount(np.diff(items) % num_items * 16 // num_items, minlength=16)
    expected = steps.sum() / 16
    assert ((steps - expected) ** 2 / expected).sum() < 45  # 15 degrees of freedom: probability 1e-4
