"""Small arithmetic for the messages of rules about divisors."""

from __future__ import annotations

import math

from w1train.config.errors import listing

_MOST_EXAMPLES = 12
# What is looked through for divisors: all of them for numbers up to 10^12. A mistyped one of 20 digits would take for ever.
_LARGEST_TRIED = 1_000_000


def does_not_divide(divisor: int, number: int) -> bool:
    """False also when either is not positive: the ranges report that."""
    return divisor > 0 and number > 0 and number % divisor != 0


def divisors(number: int) -> str:
    """The divisors of a positive number, the smallest ones if there are many."""
    root = math.isqrt(number)
    small = [divisor for divisor in range(1, min(root, _LARGEST_TRIED) + 1) if number % divisor == 0]
    if root > _LARGEST_TRIED:
        return listing([*small[:_MOST_EXAMPLES], "..."])
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    return listing(divisors if len(divisors) <= _MOST_EXAMPLES else [*divisors[:_MOST_EXAMPLES], "..."])


def near(number: int, unit: int) -> str:
    below = number // unit * unit
    return listing(multiple for multiple in (below, below + unit) if multiple > 0).replace(", ", " or ")
