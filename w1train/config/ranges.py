"""Intervals of valid numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# For every number, whatever its own range: integers end in 64-bit tensors, indices and clocks, others in fp32.
LARGEST_INTEGER = (1 << 63) - 1
LARGEST_FLOAT = 1.0e38


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of valid numbers, within what any number may be."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        # Positive conditions, so that NaN is outside. Nothing makes a float of an integer: one of 400 digits has none.
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return above and below and abs(value) <= _largest(value)

    def words(self, value: float) -> str:
        """What is valid instead of a number that is outside."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"a finite number {self}"
        is_beyond = value > _largest(value)
        return f"a number {replace(self, high=min(self.high, _largest(value))) if is_beyond else self}"

    def __str__(self) -> str:
        bounds = [f"{'>=' if self.includes_low else '>'} {self.low}"]
        if self.high != math.inf:
            bounds.append(f"{'<=' if self.includes_high else '<'} {self.high}")
        return " and ".join(bounds)


def _largest(value: float) -> float:
    return LARGEST_INTEGER if isinstance(value, int) else LARGEST_FLOAT


POSITIVE = Range(0, includes_low=False)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, includes_high=False)
# A year: far more than any wait, and a time that every clock and every timedelta can hold.
SECONDS = Range(0, 31_536_000, includes_low=False)
# Widths, layers, ranks: a million is beyond any machine.
SIZE = Range(1, 1 << 20)
# Places of a sequence and samples of a batch are counted in 32 bits.
LENGTH = Range(1, (1 << 31) - 1)
# Some stages together stay within 64 bits.
TOKENS = Range(1, 10**18)
