"""Constraints on single values: ranges of numbers and texts that are paths, and the types of the schema that carry them.

A field of the schema names its constraint in its type: ``Annotated[int, Range(1, 4096)]``. The rule of single values
(``w1train.config.rules.value_rules``), docs/configuration.md and the import of Hugging Face models read it from there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Annotated

# Every number is within these bounds, whatever its own range: integers end in 64-bit tensors, indices and clocks, and other numbers in
# fp32.
LARGEST_INTEGER = (1 << 63) - 1
LARGEST_FLOAT = 1.0e38
# Python's form of a byte that is not UTF-8 is a lone surrogate, which cannot be written to a file. NUL ends a path.
_NOT_IN_PATHS = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of valid numbers."""

    minimum: float
    maximum: float = math.inf
    includes_minimum: bool = True
    includes_maximum: bool = True

    def __contains__(self, value: float) -> bool:
        # The conditions are positive, so that NaN is outside. No integer is converted to a float, because an integer of 400 digits has no
        # float.
        above = value >= self.minimum if self.includes_minimum else value > self.minimum
        below = value <= self.maximum if self.includes_maximum else value < self.maximum
        return above and below and abs(value) <= _largest(value)

    def words(self, value: float) -> str:
        """Say in words what is valid instead of ``value``, a number outside of the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"a finite number {self}"
        is_beyond = value > _largest(value)
        return f"a number {replace(self, maximum=min(self.maximum, _largest(value))) if is_beyond else self}"

    def __str__(self) -> str:
        bounds = [f"{'>=' if self.includes_minimum else '>'} {self.minimum}"]
        if self.maximum != math.inf:
            bounds.append(f"{'<=' if self.includes_maximum else '<'} {self.maximum}")
        return " and ".join(bounds)


@dataclass(frozen=True, slots=True)
class PathText:
    """Texts that can be the path of a file or the URL of an object: not empty, in UTF-8, without NUL."""

    valid: str = "a path"
    """What the field takes, in words."""

    def __contains__(self, text: str) -> bool:
        return text != "" and not _NOT_IN_PATHS.search(text)

    def words(self, text: str) -> str:
        """Say in words what is valid instead of ``text``, which is no path."""
        return f"{self.valid}, in UTF-8 and without the character NUL" if text else self.valid


Constraint = Range | PathText


def _largest(value: float) -> float:
    return LARGEST_INTEGER if isinstance(value, int) else LARGEST_FLOAT


PositiveInteger = Annotated[int, Range(1)]
NonNegativeInteger = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, includes_minimum=False)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, includes_minimum=False)]
FractionBelowOne = Annotated[float, Range(0, 1, includes_maximum=False)]
Seconds = Annotated[float, Range(0, 31_536_000, includes_minimum=False)]
"""At most a year: far more than any wait, and a time that every clock and every timedelta can hold."""
Size = Annotated[int, Range(1, 1 << 20)]
"""Widths, layers and ranks. A million is more than any machine has."""
Length = Annotated[int, Range(1, (1 << 31) - 1)]
"""Places of a sequence and samples of a batch, which are counted in 32 bits."""
Tokens = Annotated[int, Range(1, 10**18)]
"""Tokens of a stage. The sum of several stages stays within 64 bits."""
Seed = Annotated[int, Range(0, LARGEST_INTEGER)]
RequiredPath = Annotated[str, PathText()]
OptionalPath = Annotated[str, PathText("a path or null")] | None
