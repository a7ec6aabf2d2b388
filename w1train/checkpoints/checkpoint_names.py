"""The names of checkpoints in the ``checkpoints`` directory of a run, or in object storage. Nothing here looks into a checkpoint.

    step_0000000012                     the checkpoint of a step
    average_0000000012_89abcdef         an average of checkpoints: its newest step, and a code of all its steps
    .writing-NAME                       a checkpoint that is being written
    .writing-removing-NAME              a checkpoint that is being removed
    damaged-NAME, undone-NAME           a checkpoint that was renamed, so that no run resumes from it

No pattern of one kind matches a name of another kind. ``launch/newest_checkpoint.sh`` repeats the pattern of the first kind.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

LARGEST_STEP = 10**10 - 1
"""The largest step that a name has digits for."""
DAMAGED = "damaged-"
"""Begins the name of a checkpoint whose files are not what its manifest says."""
UNDONE = "undone-"
"""Begins the name of a checkpoint whose steps are trained again."""
_STEP = re.compile(r"step_([0-9]{10})")
_AVERAGE = "average_"
_WRITING = ".writing-"
_REMOVING = "removing-"


def step_path(directory: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step, which may not exist."""
    return directory / f"step_{step:010d}"


def step_of_name(name: str) -> int | None:
    """Return the step of a checkpoint by its name, or None if this is not the name of a step's checkpoint."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def step_of(path: Path) -> int:
    """Return the step of a path that ``step_path`` or ``step_paths`` returned."""
    step = step_of_name(path.name)
    assert step is not None, path
    return step


def step_paths(directory: Path) -> list[Path]:
    """Return the paths that have the name of a step's checkpoint, ascending by step, whether they are complete or not."""
    return sorted(path for path in directory.iterdir() if step_of_name(path.name) is not None) if directory.is_dir() else []


def average_path(directory: Path, steps: Sequence[int]) -> Path:
    """Return the path of the average of the checkpoints of some steps, which may not exist."""
    code = zlib.crc32(json.dumps(sorted(steps)).encode())
    return directory / f"{_AVERAGE}{max(steps):010d}_{code:08x}"


def average_paths(directory: Path) -> list[Path]:
    """Return the paths that have the name of an average, whether they are complete or not."""
    return sorted(directory.glob(f"{_AVERAGE}*"))


def writing_path(final: Path) -> Path:
    """Return the path at which a checkpoint is written before it gets its name."""
    return final.with_name(f"{_WRITING}{final.name}")


def removing_path(path: Path) -> Path:
    """Return the path at which a checkpoint is removed after it has lost its name."""
    return path.with_name(f"{_WRITING}{_REMOVING}{path.name}")


def unfinished_paths(directory: Path) -> list[Path]:
    """Return what a killed process was writing or removing."""
    return sorted(directory.glob(f"{_WRITING}*"))


def damaged_paths(directory: Path) -> list[Path]:
    """Return the checkpoints that were renamed because they are damaged."""
    return sorted(directory.glob(f"{DAMAGED}*"))


def set_aside_path(path: Path, prefix: str) -> Path:
    """Return the first free path for a checkpoint that gets a prefix (DAMAGED or UNDONE), with a number from 2 on if others have it."""
    target, number = path.with_name(f"{prefix}{path.name}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{prefix}{path.name}.{number}")
    return target
