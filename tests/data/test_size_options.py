"""Options that are a number of bytes."""

from __future__ import annotations

import argparse

import pytest

from data_tools.corpus_options import size


def test_sizes_are_numbers_with_a_unit():
    assert [size(text) for text in ("1", "500000", "2K", "64M", "2G")] == [1, 500000, 2048, 64 << 20, 2 << 30]
    for text in ("", "0", "-1", "1.5M", "M", "64MB", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number of bytes"):
            size(text)
