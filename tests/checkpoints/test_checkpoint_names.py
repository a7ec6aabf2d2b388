"""Names of checkpoints: those of checkpoints that old runs wrote, told apart from each other, and the same in the shell."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.checkpoints import checkpoint_names
from w1train.checkpoints.checkpoint_names import (
    DAMAGED,
    LARGEST_STEP,
    UNDONE,
    average_path,
    average_paths,
    damaged_paths,
    removing_path,
    set_aside_path,
    step_of,
    step_of_name,
    step_path,
    step_paths,
    unfinished_paths,
    writing_path,
)

DIRECTORY = Path("run/checkpoints")
STEP, AVERAGE = step_path(DIRECTORY, 12), average_path(DIRECTORY, [12, 4])
NAMES = {
    "step": (STEP, "step_0000000012"),
    "average": (AVERAGE, "average_0000000012_5a55bc2c"),
    "writing a step": (writing_path(STEP), ".writing-step_0000000012"),
    "writing an average": (writing_path(AVERAGE), ".writing-average_0000000012_5a55bc2c"),
    "removing": (removing_path(STEP), ".writing-removing-step_0000000012"),
    "damaged": (set_aside_path(STEP, DAMAGED), "damaged-step_0000000012"),
    "undone": (set_aside_path(STEP, UNDONE), "undone-step_0000000012"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_those_that_runs_have_had_before(kind):
    path, name = NAMES[kind]
    assert path == DIRECTORY / name


def test_each_name_is_found_as_what_it_is(tmp_path):
    for path, _ in NAMES.values():
        (tmp_path / path.name).mkdir()
    (tmp_path / "damaged-step_0000000012.2").mkdir()
    (tmp_path / "step_12").mkdir()
    found = {
        "step": step_paths(tmp_path),
        "average": average_paths(tmp_path),
        "unfinished": unfinished_paths(tmp_path),
        "damaged": damaged_paths(tmp_path),
    }
    assert {kind: [path.name for path in paths] for kind, paths in found.items()} == {
        "step": ["step_0000000012"],
        "average": ["average_0000000012_5a55bc2c"],
        "unfinished": [
            ".writing-average_0000000012_5a55bc2c",
            ".writing-removing-step_0000000012",
            ".writing-step_0000000012",
        ],
        "damaged": ["damaged-step_0000000012", "damaged-step_0000000012.2"],
    }
    assert set_aside_path(tmp_path / STEP.name, DAMAGED).name == "damaged-step_0000000012.3"
    assert step_paths(tmp_path / "nowhere") == []


@given(st.lists(st.integers(0, LARGEST_STEP), min_size=2, max_size=4))
def test_steps_come_back_from_names_and_are_sorted_as_numbers(steps):
    paths = [step_path(DIRECTORY, step) for step in steps]
    assert [step_of(path) for path in sorted(paths)] == sorted(steps)
    assert average_path(DIRECTORY, steps) == average_path(DIRECTORY, steps[::-1])


@given(st.text(max_size=20) | st.from_regex(r"step_[0-9]{9,11}.?", fullmatch=True))
def test_another_name_has_no_step(name):
    step = step_of_name(name)
    assert step is None or step_path(Path(), step).name == name


def test_scripts_find_the_checkpoints_of_steps_alone():
    """launch/job.sh counts attempts without a new checkpoint, and launch/torchrun.sh asks whether a run has one."""
    text = (Path(checkpoint_names.__file__).parents[2] / "launch/newest_checkpoint.sh").read_text()
    (pattern,) = re.findall(r'"/checkpoints/(.*?);', text)
    assert [path.name for path, _ in NAMES.values() if fnmatch.fnmatchcase(path.name, pattern)] == [STEP.name]
