"""The arithmetic of a chart: scales, ticks, ranges, smoothing and thinning. This module does not draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from w1train.runtime.quantities import quantity

Values = Sequence[float | None]


@dataclass(slots=True)
class Scale:
    """A linear or logarithmic map of [low, high] to the pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


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


def linear_ticks(low: float, high: float, max_ticks: int, integer: bool = False) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten inside [low, high], about ``max_ticks`` at most."""
    raw = (high - low) / max_ticks
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    if integer:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Ticks are rounded twelve digits behind the first digit of the step. If they were rounded at a fixed place, the ticks of very small
    # numbers would all be 0.
    digits = max(12, 12 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten inside [low, high]; fewer factors, and then fewer powers, if there are too many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= max_ticks:
            return inside if len(inside) >= 2 else linear_ticks(low, high, 5)
    return inside[:: math.ceil(len(inside) / max_ticks)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the texts of ticks: evenly spaced ticks have the same number of decimals, large numbers are 10k, and small ones 3e-4."""
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 10_000:
        return [quantity(tick) if tick else "0" for tick in ticks]
    if 0 < largest < 0.01:
        return [scientific(tick) for tick in ticks]
    gaps = [abs(after - before) for before, after in pairwise(ticks)]
    uneven = bool(gaps) and max(gaps) > 1.5 * min(gaps)
    decimals = max(0, -math.floor(math.log10(min(gaps, default=1.0)) + 1e-9))
    return [f"{tick:,.{decimals}f}" if tick and not uneven else f"{tick:g}" for tick in ticks]


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


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending positions so that neighbours are at least ``gap`` apart, from ``low`` up and then from ``high`` down."""
    placed: list[float] = []
    for position in positions:
        placed.append(max(position, placed[-1] + gap if placed else low))
    limit = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
