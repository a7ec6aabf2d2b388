"""Assumptions on the command line of w1train.plan: the types of the fields carry the valid ranges."""

import dataclasses

import pytest

from w1train.config.constraints import Range
from w1train.config.field_types import field_ranges
from w1train.planning.assumptions import Assumptions, replace_assumptions


def test_every_assumption_has_a_range():
    assert list(field_ranges(Assumptions)) == [field.name for field in dataclasses.fields(Assumptions)]
    assert {name for name, valid in field_ranges(Assumptions).items() if valid == Range(0, 1, includes_minimum=False)} == {
        name for name in field_ranges(Assumptions) if name.endswith("efficiency")
    }


def test_assumptions_are_replaced():
    assumptions, problems = replace_assumptions(Assumptions(), ["matmul_efficiency=1", "reserved_gib=0"])
    assert (assumptions.matmul_efficiency, assumptions.reserved_gib, problems) == (1.0, 0.0, [])


@pytest.mark.parametrize(
    ("text", "found", "valid"),
    [
        ("matmul_efficiency=1.5", "1.5", "a number > 0 and <= 1"),
        ("network_efficiency=0", "0", "a number > 0 and <= 1"),
        ("collective_latency=-1", "-1", "a number >= 0"),
        ("reserved_gib=inf", "inf", "a number >= 0"),
        ("reserved_gib=x", "x", "a number >= 0"),
        ("reserved_gib", "nothing", "a number >= 0"),
    ],
)
def test_wrong_assumptions_are_reported(text, found, valid):
    assumptions, (problem,) = replace_assumptions(Assumptions(), [text])
    assert assumptions == Assumptions()
    assert (problem.key, problem.found, problem.valid) == (f"--assume {text}", found, valid)
