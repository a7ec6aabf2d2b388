"""The axis of a benchmark's chart."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.common.axis import Scale, linear_ticks, tick_labels

moderate = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))


@pytest.mark.parametrize("value", [1e-9, 3e-13, 1e-15, 1e-200])
def test_ticks_of_very_small_numbers_differ(value):
    ticks = linear_ticks(0.0, value, 5)
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


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 100.0, 200.0], ["0", "100", "200"]),
        ([1.5, 2.0, 2.5], ["1.5", "2.0", "2.5"]),
        ([0.0, 10_000.0, 20_000.0], ["0", "10k", "20k"]),
        ([0.0, 1e-4, 2e-4], ["0", "1e-4", "2e-4"]),
        ([3.0], ["3"]),
        ([], []),
    ],
)
def test_tick_labels(ticks, labels):
    assert tick_labels(ticks) == labels


def test_a_scale():
    assert Scale(0, 10, 100, 0)(2.5) == 75
