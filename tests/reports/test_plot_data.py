from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.reports.plot_data import bucket_means, envelope, finite, moving_average, padded_range, scientific, without_outliers

moderate = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))
series = st.lists(st.none() | moderate, min_size=1, max_size=300)


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
