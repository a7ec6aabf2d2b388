"""Cases of a parametrized test, and examples of a property, that `make test` leaves to `make test-all`; and a limit of waits."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import hypothesis
import pytest

_NUM_EXAMPLES = 100
"""Hypothesis's own number of examples."""

LONGER_THAN_A_TEST = 600.0
"""Seconds. A wait that should end at once gets this limit: pytest's own limit on a test (pyproject.toml) ends it first, so that the test
fails if the wait lasts, and passes on a busy machine."""


def slow_except(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark all cases as `slow` but the kept ones, which stand for the others in `make test`. A case is the value of one parameter."""
    cases = list(cases)
    assert all(case in cases for case in kept), f"{kept} are not all among {cases}"
    return [pytest.param(case, marks=[] if case in kept else [pytest.mark.slow]) for case in cases]


def examples(number: int) -> int:
    """Return the number of examples of a property that has ``number`` of them in `make test-all`; `make test` draws a part of them."""
    return max(1, number * hypothesis.settings().max_examples // _NUM_EXAMPLES)
