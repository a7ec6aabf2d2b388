"""Which checkpoint a start goes on from: the newest good one, here or in object storage; never silently none.

What is found damaged is set aside (renamed, so that nothing takes it for a checkpoint) and never deleted.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch.distributed as dist

from w1train.config.errors import UserError
from w1train.config.schema_operation import CheckpointConfig
from w1train.runtime.distributed import on_main_rank
from w1train.runtime.files import write_text
from w1train.training.checkpoint import remove_unfinished, require_position
from w1train.training.commit import DAMAGED, UNDONE, set_aside
from w1train.training.manifest import (
    CheckpointError,
    complete_steps,
    is_complete,
    latest_step,
    require_manifests,
    step_directories,
    step_path,
    verify_checkpoint,
)
from w1train.training.remote_checkpoints import RemoteCheckpoints, fetch_checkpoint

logger = logging.getLogger(__name__)

_RETURNED = ".resume_step"
"""Holds the checkpoint.resume_step that was obeyed: the same command again goes on, not back again."""


def choose_checkpoint(directory: Path, settings: CheckpointConfig) -> int | None:
    """The step of the verified checkpoint that a start goes on from; None = there never was one. Called on every rank, before anything
    else has looked into ``directory``.

    Raises:
        CheckpointError: on every rank; checkpoints are damaged, and the settings do not allow another, or there is none.
        UserError: on every rank; there is no checkpoint of checkpoint.resume_step.
    """
    on_main_rank(partial(remove_unfinished, directory))
    step = _chosen_step(directory, settings)
    if step is not None:
        return step
    if settings.on_damage == "stop":
        step = _newest_or_stop(directory, hashes=settings.verify)
    else:
        step = newest_good_step(directory, hashes=settings.verify)
        if step is not None:
            on_main_rank(partial(set_aside_damaged, directory, step))
    if step is None and settings.upload is not None:
        step = _fetch_newest(RemoteCheckpoints(settings.upload), directory)
    if step is None:
        on_main_rank(partial(_require_none_lost, directory))
    return step


def newest_good_step(directory: Path, *, hashes: bool = True) -> int | None:
    """The step of the newest checkpoint whose files are what its manifest says. Called on every rank; changes nothing.

    Args:
        hashes: False = compare sizes alone.
    """
    for path in on_main_rank(lambda: sorted(step_directories(directory), reverse=True)):
        if _is_good(path, hashes=hashes):
            return _step(path)
    return None


def _is_good(path: Path, *, hashes: bool) -> bool:
    try:
        verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=hashes)
        if hashes:
            on_main_rank(partial(require_position, path))
    except CheckpointError as error:
        if dist.get_rank() == 0:
            logger.warning("%s", str(error).replace(" Remove this directory to resume from an older checkpoint.", ""))
        return False
    return True


def _newest_or_stop(directory: Path, *, hashes: bool) -> int | None:
    on_main_rank(partial(require_manifests, directory))
    step = on_main_rank(partial(latest_step, directory))
    if step is not None:
        verify_checkpoint(step_path(directory, step), rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=hashes)
    return step


def set_aside_damaged(directory: Path, good: int) -> None:
    """Set aside what is newer than the newest good checkpoint: its step is done again. Rank 0 only."""
    for path in step_directories(directory):
        if _step(path) > good or not is_complete(path):
            logger.warning("%s is damaged and is now %s; training goes on from step %d", path, set_aside(path, DAMAGED).name, good)


def _chosen_step(directory: Path, settings: CheckpointConfig) -> int | None:
    """checkpoint.resume_step, the first time that it is asked for. Later checkpoints are set aside: their steps are done again."""
    step = settings.resume_step
    if not on_main_rank(partial(_is_to_return, directory, step)):
        return None
    assert step is not None
    on_main_rank(partial(_require_step, directory, step))
    verify_checkpoint(step_path(directory, step), rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=settings.verify)
    if settings.upload is not None:
        # First: were it left out by a failure, a later start that has lost its disk would fetch what is undone here.
        on_main_rank(partial(RemoteCheckpoints(settings.upload).undo_after, step))
    on_main_rank(partial(_return_to, directory, step))
    return step


def _is_to_return(directory: Path, step: int | None) -> bool:
    marker = directory / _RETURNED
    if step is None:
        marker.unlink(missing_ok=True)
        return False
    if marker.exists() and marker.read_text(encoding="utf-8") == str(step):
        logger.info("checkpoint.resume_step=%d was obeyed by an earlier start: this one goes on from the newest checkpoint", step)
        return False
    return True


def _require_step(directory: Path, step: int) -> None:
    steps = complete_steps(directory)
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"checkpoint.resume_step: {directory} has no complete checkpoint of step {step}; it has: {there}")


def _return_to(directory: Path, step: int) -> None:
    for path in step_directories(directory):
        if _step(path) > step:
            logger.warning("%s is now %s: checkpoint.resume_step=%d", path, set_aside(path, UNDONE).name, step)
    write_text(directory / _RETURNED, str(step))


def _fetch_newest(remote: RemoteCheckpoints, directory: Path) -> int | None:
    """The newest good checkpoint of object storage, copied here; what is here already is damaged, and is set aside."""
    steps = on_main_rank(remote.steps)
    if steps:
        on_main_rank(lambda: [set_aside(path, DAMAGED) for path in step_directories(directory)])
    for step in reversed(steps):
        fetch_checkpoint(remote, step, directory)
        if _is_good(step_path(directory, step), hashes=True):
            return step
        on_main_rank(partial(set_aside, step_path(directory, step), DAMAGED))
    return None


def _require_none_lost(directory: Path) -> None:
    """A run that has had checkpoints does not begin again by itself.

    Raises:
        CheckpointError: there are damaged ones.
    """
    damaged = sorted({*step_directories(directory), *directory.glob(f"{DAMAGED}*")})
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise CheckpointError(
            f"{directory} has no good checkpoint, only damaged ones: {names}. Bring back a copy of one, or move them away to begin again "
            "at step 0"
        )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
