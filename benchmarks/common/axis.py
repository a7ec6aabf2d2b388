"""The axis of a chart: its scale, and its ticks with their texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from w1train.reports.plot_data import scientific
from w1train.runtime.quantities import quantity


@dataclass(slots=True)
class Scale:
    """A linear map of [low, high] to the pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def linear_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten inside [low, high], about ``max_ticks`` at most."""
    raw = (high - low) / max_ticks
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Ticks are rounded twelve digits behind the first digit of the step. If they were rounded at a fixed place, the ticks of very small
    # numbers would all be 0.
    digits = max(12, 12 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the texts of evenly spaced ticks: they have the same number of decimals, large numbers are 10k, and small ones 3e-4."""
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 10_000:
        return [quantity(tick) if tick else "0" for tick in ticks]
    if 0 < largest < 0.01:
        return [scientific(tick) for tick in ticks]
    gaps = [abs(after - before) for before, after in pairwise(ticks)]
    decimals = max(0, -math.floor(math.log10(min(gaps, default=1.0)) + 1e-9))
    return [f"{tick:,.{decimals}f}" if tick else "0" for tick in ticks]
