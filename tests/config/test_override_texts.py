"""Values of Python as overrides: the parser of the command line reads back what was given."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slow import examples
from w1train.config.override_texts import override_texts

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.text("'\\\"$ ={}[],:~\n", max_size=8)
)


def read_back(value: Any) -> Any:
    (text,), problems = override_texts({"a.b": value})
    assert problems == []
    return OverridesParser.create().parse_override(text).value()


@settings(max_examples=examples(40))
@given(SCALARS | st.lists(SCALARS, max_size=3))
def test_a_value_is_read_back(value):
    found = read_back(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("/a b/c"), "/a b/c"),
        ((1, "2"), [1, "2"]),
        (np.int64(4), 4),
        (np.float32(0.5), 0.5),
        ({}, {}),
        ([{"weight": 2, "prefix": "a'b"}], [{"weight": 2, "prefix": "a'b"}]),
        (math.inf, math.inf),
    ],
)
def test_values_of_other_types(value, expected):
    assert read_back(value) == expected


def test_a_mapping_is_its_keys():
    assert override_texts({"a": {"b": {"c": 1}, "d": None}, "~e": None})[0] == ["a.b.c=1", "a.d=null", "~e"]


def test_all_that_has_no_text_is_reported():
    texts, problems = override_texts({"a": object(), "b=c": 1, 3: 1, "d": 1, "e": np.zeros(2), "f": {"g": {1}}})
    assert texts == ["d=1"]
    assert [(problem.key, problem.found.split()[0]) for problem in problems] == [
        ("a", "object"),
        ("b=c", "the"),
        ("3", "the"),
        ("e", "ndarray"),
        ("f.g", "set"),
    ]
