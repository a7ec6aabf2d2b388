from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from w1train.reports.plot_data import (
    Scale,
    bucket_means,
    envelope,
    finite,
    linear_ticks,
    log_ticks,
    moving_average,
    padded_range,
    scientific,
    spread,
    tick_labels,
    without_outliers,
)

moderate = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))
series = st.lists(st.none() | moderate, min_size=1, max_size=300)


@pytest.mark.parametrize("value", [1e-9, 3e-13, 1e-15, 1e-200])
def test_ticks_of_very_small_numbers_differ(value):
    ticks = linear_ticks(*padded_range([value]), 5)
    assert len(set(ticks)) == len(ticks) >= 2
    assert all(tick_labels(ticks))


@given(moderate, moderate, st.integers(2, 12))
def test_linear_ticks_are_round_few_and_inside(low, high, max_ticks):
    assume(high - low > 1e-3 and high - low > 1e-6 * max(abs(low), abs(high)))
    ticks = linear_ticks(low, high, max_ticks)
    assert 0 <= len(ticks) <= max_ticks + 1
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    if len(ticks) > 1:
        gap = ticks[1] - ticks[0]
        assert float(f"{gap:.3e}"[0]) in (1, 2, 5)


@given(st.floats(1e-9, 1e9), st.floats(1.15, 1e12), st.integers(3, 10))
def test_log_ticks_are_inside_and_at_least_two(low, ratio, max_ticks):
    ticks = log_ticks(low, low * ratio, max_ticks)
    assert len(ticks) >= (2 if ratio > 2 else 1)
    assert ticks == sorted(ticks)
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in ticks)


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 100.0, 200.0], ["0", "100", "200"]),
        ([1.5, 2.0, 2.5], ["1.5", "2.0", "2.5"]),
        ([0.0, 10_000.0, 20_000.0], ["0", "10k", "20k"]),
        ([0.0, 1e-4, 2e-4], ["0", "1e-4", "2e-4"]),
        ([0.5, 1.0, 2.0, 5.0], ["0.5", "1", "2", "5"]),
        ([3.0], ["3"]),
        ([], []),
    ],
)
def test_tick_labels(ticks, labels):
    assert tick_labels(ticks) == labels


def test_scientific():
    assert [scientific(value) for value in (3e-4, 2.5e-5, 0.0, 1.0)] == ["3e-4", "2.5e-5", "0", "1e0"]


@given(st.lists(st.floats(1e-6, 1e6), max_size=30), st.booleans(), st.booleans())
def test_the_range_holds_the_values_and_is_not_empty(values, log, from_zero):
    low, high = padded_range(values, log, from_zero)
    assert low < high
    assert all(low <= value <= high for value in values)
    assert not log or low > 0


def test_outliers_go_only_where_they_flatten():
    smooth = [math.sin(index) for index in range(400)]
    assert without_outliers(smooth) == smooth
    assert max(without_outliers([*smooth, 1000.0])) <= 1.0
    assert without_outliers([1.0, 2.0, 1000.0]) == [1.0, 2.0, 1000.0]


@given(series, st.integers(0, 10).map(lambda half: 2 * half + 1))
def test_moving_average_is_the_mean_of_the_window(ys, window):
    means = moving_average(ys, window)
    for index, mean in enumerate(means):
        known = finite(ys[max(0, index - window // 2) : index + window // 2 + 1])
        if not known:
            assert mean is None
        else:
            assert mean == pytest.approx(math.fsum(known) / len(known), rel=1e-6, abs=1e-3)


@given(series, st.integers(1, 50))
def test_bucket_means_keep_the_mean_x_and_the_bound(ys, max_points):
    xs = [float(index) for index in range(len(ys))]
    mean_xs, means = bucket_means(xs, ys, max_points)
    assert len(mean_xs) == len(means) <= max_points
    assert mean_xs == sorted(mean_xs)
    known = finite(ys)
    assert all(min(known) - 1e-3 <= mean <= max(known) + 1e-3 for mean in finite(means))


@given(series, st.integers(1, 50))
def test_the_envelope_holds_every_point(ys, max_points):
    xs = [float(index) for index in range(len(ys))]
    kept_xs, lows, highs = envelope(xs, ys, max_points)
    assert len(kept_xs) == len(lows) == len(highs) <= max_points
    assert kept_xs == sorted(kept_xs)
    if finite(ys):
        assert (min(lows), max(highs)) == (min(finite(ys)), max(finite(ys)))
        assert all(low <= high for low, high in zip(lows, highs, strict=True))


@given(st.lists(st.floats(0, 300), max_size=8).map(sorted))
def test_labels_do_not_overlap(positions):
    placed = spread(positions, 15, 0, 300)
    assert all(after - before >= 15 - 1e-9 for before, after in pairwise(placed))
    assert all(-1e-9 <= position <= 300 + 1e-9 for position in placed)


def test_labels_that_have_room_stay():
    assert spread([10.0, 100.0, 200.0], 15, 0, 300) == [10.0, 100.0, 200.0]


def test_scales():
    assert Scale(0, 10, 100, 0)(2.5) == 75
    assert Scale(1, 100, 0, 50, log=True)(10) == pytest.approx(25)
