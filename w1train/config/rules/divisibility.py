"""Arithmetic of divisors and multiples, for the messages of rules."""

from __future__ import annotations

import math

from w1train.config.errors import listing

_MOST_EXAMPLES = 12
# Candidates for divisors up to here find all divisors of numbers up to 10^12. To factor a mistyped number of 20 digits would take hours.
_LARGEST_TRIED = 1_000_000


def does_not_divide(divisor: int, number: int) -> bool:
    """Tell whether a positive number is not a multiple of a positive divisor. For other numbers the answer is False, because ranges report
    them."""
    return divisor > 0 and number > 0 and number % divisor != 0


def divisors(number: int) -> str:
    """List the divisors of a positive number; only the smallest if there are many."""
    root = math.isqrt(number)
    small = [divisor for divisor in range(1, min(root, _LARGEST_TRIED) + 1) if number % divisor == 0]
    if root > _LARGEST_TRIED:
        return listing([*small[:_MOST_EXAMPLES], "..."])
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    return listing(divisors if len(divisors) <= _MOST_EXAMPLES else [*divisors[:_MOST_EXAMPLES], "..."])


def near(number: int, unit: int) -> str:
    """List the positive multiples of ``unit`` next to a number: "8 or 12"."""
    below = number // unit * unit
    return listing(multiple for multiple in (below, below + unit) if multiple > 0).replace(", ", " or ")
