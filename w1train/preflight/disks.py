"""The check of the directories that a run writes to, and of the space for its checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from w1train.checkpoints.manifest import complete_steps
from w1train.config.errors import Problem
from w1train.config.rules.value_rules import has_valid_values
from w1train.config.schedule import num_steps
from w1train.config.schema import Config
from w1train.planning.checkpoint_sizes import checkpoint_bytes, most_checkpoints
from w1train.preflight.next_command import absolute
from w1train.runtime.run_directory import RunDirectory

_GIB = 1 << 30


def directories_rule(config: Config) -> Iterator[Problem]:
    """Check that the run directory and the cache of datasets can be made and written to."""
    directories = {"runs_dir": os.path.join(config.runs_dir, config.name), "data.cache_directory": config.data.cache_directory}
    for key, path in directories.items():
        if path is not None and (reason := _why_not_writable(Path(absolute(path)))) is not None:
            yield Problem(key, reason, "a directory that can be made and written to", f"{key}=/another/directory")


def space_rule(config: Config, max_steps: int | None = None) -> Iterator[Problem]:
    """Check that the disk has space for all checkpoints that a new run keeps at a time. A run that resumes has begun to use this space, and
    warns when it is full.

    Args:
        max_steps: the step at which the run ends this time; None = the last step of the schedule.
    """
    if not has_valid_values(config) or has_checkpoint(config):
        return
    steps = num_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
    steps = steps if max_steps is None else min(steps, max_steps)
    count, size = most_checkpoints(config.checkpoint, steps), checkpoint_bytes(config)
    place = _nearest_directory(Path(absolute(os.path.join(config.runs_dir, config.name))))
    if place is None or not (usage := shutil.disk_usage(place)).total or usage.free >= count * size:
        return
    found = f"{usage.free / _GIB:.1f} GiB free in {place}"
    valid = f"{count * size / _GIB:.1f} GiB: the run has up to {count} checkpoints of {size / _GIB:.1f} GiB at a time"
    yield Problem("runs_dir", found, valid, "runs_dir=/another/disk, or fewer checkpoints: checkpoint.keep=1 checkpoint.keep_every=0")


def has_checkpoint(config: Config) -> bool:
    """Tell whether the run has a complete checkpoint, from which it will resume."""
    directory = RunDirectory(Path(config.runs_dir) / config.name)
    return os.access(directory.checkpoints, os.R_OK) and bool(complete_steps(directory.checkpoints))


def _why_not_writable(path: Path) -> str | None:
    place = _nearest_directory(path)
    if place is None:
        blocking = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        return f"{path}, but {blocking} is not a directory"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{path}, but this user may not write to {place}" if place != path else f"{path}, to which this user may not write"
    return None


def _nearest_directory(path: Path) -> Path | None:
    """Return the directory, or the nearest of its parents that exists; None if something else has the name."""
    place = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    return place if place.is_dir() else None
