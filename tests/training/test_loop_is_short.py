"""The training loop is the first file that a newcomer reads: it must stay one that is read in a minute."""

from __future__ import annotations

from pathlib import Path

LOOP = Path(__file__).parents[2] / "w1train" / "training" / "loop.py"
MAX_LINES, MAX_IMPORTS = 350, 20


def test_the_loop_is_short():
    lines = LOOP.read_text().splitlines()
    assert len(lines) < MAX_LINES
    assert sum(line.startswith("from w1train") for line in lines) < MAX_IMPORTS


def test_the_loop_begins_with_fit():
    methods = [line.split("(")[0].split()[-1] for line in LOOP.read_text().splitlines() if line.startswith("    def ")]
    assert methods[:2] == ["__init__", "fit"]
