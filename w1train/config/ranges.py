"""Intervals of valid numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of valid numbers."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        # Positive conditions, so that NaN is outside.
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        bounds = [f"{'>=' if self.includes_low else '>'} {self.low}"]
        if self.high != math.inf:
            bounds.append(f"{'<=' if self.includes_high else '<'} {self.high}")
        return " and ".join(bounds)


POSITIVE = Range(0, includes_low=False)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, includes_high=False)
