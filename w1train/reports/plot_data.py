"""The arithmetic of a chart: ranges, smoothing and thinning. This module does not draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Values = Sequence[float | None]


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values without None, NaN and infinite values."""
    return [value for value in values if value is not None and math.isfinite(value)]


def padded_range(values: list[float], log: bool = False, from_zero: bool = False) -> tuple[float, float]:
    """Return a range around the values with a margin. It has a width even for one value or without values."""
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** 0.06, 1.15)
        return low / factor, high * factor
    if from_zero:
        return 0.0, high * 1.08 if high > 0 else 1.0
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - air, high + air


def without_outliers(values: list[float], share: float = 0.005) -> list[float]:
    """Return the values without the most extreme share at either end, if that share more than doubles the range: one spike should not
    flatten a curve."""
    if len(values) < 50:
        return values
    ordered = sorted(values)
    num_dropped = math.ceil(share * len(ordered))
    kept = ordered[num_dropped:-num_dropped]
    return kept if ordered[-1] - ordered[0] > 2 * (kept[-1] - kept[0]) else values


def scientific(value: float) -> str:
    """Return a number as 3e-4 or 2.5e-5, and zero as 0."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def moving_average(ys: Values, window: int) -> list[float | None]:
    """Return the mean over ``window`` (odd) values around each value, over fewer at the ends; None where no value is finite."""
    half = window // 2
    sums, counts = [0.0], [0]
    for value in ys:
        known = value is not None and math.isfinite(value)
        sums.append(sums[-1] + (value if known and value is not None else 0.0))
        counts.append(counts[-1] + known)
    means: list[float | None] = []
    for index in range(len(ys)):
        first, last = max(0, index - half), min(len(ys), index + half + 1)
        count = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / count if count else None)
    return means


def bucket_means(xs: Sequence[float], ys: Values, max_points: int) -> tuple[list[float], list[float | None]]:
    """Return at most ``max_points`` points: the mean x and the mean of the finite ys of groups of consecutive points."""
    size = math.ceil(len(xs) / max_points) or 1
    starts = range(0, len(xs), size)
    mean_xs = [_mean(xs[start : start + size]) for start in starts]
    buckets = [finite(ys[start : start + size]) for start in starts]
    return mean_xs, [_mean(bucket) if bucket else None for bucket in buckets]


def envelope(xs: Sequence[float], ys: Values, max_points: int) -> tuple[list[float], list[float], list[float]]:
    """Return x, smallest y and largest y of at most ``max_points`` groups of consecutive points, so that no spike is lost. Groups without a
    finite y are left out."""
    size = math.ceil(len(xs) / max_points) or 1
    starts = range(0, len(xs), size)
    runs = [(_mean(xs[start : start + size]), finite(ys[start : start + size])) for start in starts]
    known = [(x, values) for x, values in runs if values]
    return [x for x, _ in known], [min(values) for _, values in known], [max(values) for _, values in known]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
