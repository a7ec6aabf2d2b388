"""The choice of the checkpoint that a start resumes from: the newest good checkpoint in the run's directory or in object storage.

A run that has had checkpoints never begins again at step 0 by itself. Damaged checkpoints are never deleted, but renamed, so that no run
resumes from them.
"""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from w1train.checkpoints.checkpoint_names import DAMAGED, UNDONE, damaged_paths, step_of, step_path, step_paths, writing_path
from w1train.checkpoints.commit import remove_unfinished, set_aside
from w1train.checkpoints.loading import require_position
from w1train.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    DamagedCheckpointError,
    complete_steps,
    is_complete,
    latest_step,
    require_manifests,
)
from w1train.checkpoints.remote.remote_checkpoints import MARKER, Contents, RemoteCheckpoints, UnfinishedCopyError
from w1train.checkpoints.verification import verify_checkpoint
from w1train.config.errors import UserError
from w1train.config.reading import LARGEST_STATUS, read_bounded
from w1train.config.schema_operation import CheckpointConfig
from w1train.runtime.distributed import agreed, on_main_rank
from w1train.runtime.files import sync_directory, write_text
from w1train.runtime.object_storage import require_protocol
from w1train.runtime.record_files import read_metrics
from w1train.runtime.transfers import together

logger = logging.getLogger(__name__)

_RETURNED = ".resume_step"
"""The file with the value of checkpoint.resume_step that a start has obeyed. A later start of the same command then resumes from the newest
checkpoint, and does not go back again."""


def choose_checkpoint(directory: Path, settings: CheckpointConfig, events: Path | None = None) -> int | None:
    """Return the step of the checkpoint that a start resumes from, with its files verified, or None if the run never had a checkpoint.
    Every rank calls this, before anything else reads ``directory``.

    Args:
        events: the run's events.jsonl, which records the saves; None = not known.

    Raises:
        CheckpointError: on every rank; checkpoints are damaged or lost, and no other checkpoint is left that the settings allow.
        StorageError: on every rank; the directory has no checkpoint, and the object storage that may have one fails.
        UserError: on every rank; there is no checkpoint of checkpoint.resume_step, or the storage's protocol is not installed.
    """
    if settings.upload is not None:
        on_main_rank(partial(require_protocol, "checkpoint.upload", settings.upload))
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
        on_main_rank(partial(_require_none_lost, directory, events))
    return step


def newest_good_step(directory: Path, *, hashes: bool = True) -> int | None:
    """Return the step of the newest checkpoint whose files are what its manifest says, or None. Every rank calls this, and it changes
    nothing.

    Args:
        hashes: False compares only the sizes of the files.
    """
    for path in on_main_rank(lambda: step_paths(directory)[::-1]):
        if _is_good(path, hashes=hashes):
            return step_of(path)
    return None


def _is_good(path: Path, *, hashes: bool) -> bool:
    try:
        verify_checkpoint(path, rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=hashes)
        if hashes:
            on_main_rank(partial(require_position, path))
    except DamagedCheckpointError as error:
        if dist.get_rank() == 0:
            logger.warning("%s is damaged: %s.", error.path, error.reason)
        return False
    return True


def _newest_or_stop(directory: Path, *, hashes: bool) -> int | None:
    on_main_rank(partial(require_manifests, directory))
    step = on_main_rank(partial(latest_step, directory))
    if step is not None:
        verify_checkpoint(step_path(directory, step), rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=hashes)
    return step


def set_aside_damaged(directory: Path, good: int) -> None:
    """Rename the checkpoints that are newer than the newest good checkpoint, because their steps are trained again. Only rank 0 calls
    this."""
    for path in step_paths(directory):
        if step_of(path) > good or not is_complete(path):
            logger.warning("%s is damaged and is now %s; training resumes from step %d", path, set_aside(path, DAMAGED).name, good)


def _chosen_step(directory: Path, settings: CheckpointConfig) -> int | None:
    """Return checkpoint.resume_step at the first start that has this value, and None otherwise. Rename later checkpoints, because their
    steps are trained again."""
    step = settings.resume_step
    if not on_main_rank(partial(_is_to_return, directory, step)):
        return None
    assert step is not None
    on_main_rank(partial(_require_step, directory, step))
    verify_checkpoint(step_path(directory, step), rank=dist.get_rank(), num_ranks=dist.get_world_size(), hashes=settings.verify)
    if settings.upload is not None:
        # This comes first. If a failure prevented it, a later start that has lost its disk would fetch the copies that are undone here.
        on_main_rank(partial(RemoteCheckpoints(settings.upload).undo_after, step))
    on_main_rank(partial(_return_to, directory, step))
    return step


def _is_to_return(directory: Path, step: int | None) -> bool:
    marker = directory / _RETURNED
    if step is None:
        marker.unlink(missing_ok=True)
        return False
    if marker.exists() and read_bounded(marker, LARGEST_STATUS) == str(step).encode():
        logger.info("an earlier start has obeyed checkpoint.resume_step=%d: this start resumes from the newest checkpoint", step)
        return False
    return True


def _require_step(directory: Path, step: int) -> None:
    steps = complete_steps(directory)
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"checkpoint.resume_step: {directory} has no complete checkpoint of step {step}; it has: {there}")


def _return_to(directory: Path, step: int) -> None:
    for path in step_paths(directory):
        if step_of(path) > step:
            logger.warning("%s is now %s: checkpoint.resume_step=%d", path, set_aside(path, UNDONE).name, step)
    write_text(directory / _RETURNED, str(step))


def _fetch_newest(remote: RemoteCheckpoints, directory: Path) -> int | None:
    """Copy the newest good checkpoint of object storage into ``directory``, and return its step. Return None if the storage shows that
    this run has never uploaded a checkpoint.

    Raises:
        CheckpointError: on every rank; checkpoints were uploaded, and no good copy is left.
    """
    contents = on_main_rank(remote.contents)
    is_unfinished = True
    for step in reversed(contents.steps):
        try:
            fetch_checkpoint(remote, step, directory)
            return step
        except CheckpointError as error:
            is_unfinished = is_unfinished and isinstance(error, UnfinishedCopyError)
            if dist.get_rank() == 0:
                logger.warning("the copy of step %d in %s is not used: %s", step, remote.url, error)
    on_main_rank(partial(_require_none_sent, remote.url, contents, is_unfinished=is_unfinished))
    return None


def fetch_checkpoint(remote: RemoteCheckpoints, step: int, directory: Path) -> None:
    """Copy a checkpoint from object storage into the run's directory, where it appears when it is complete and verified. Every rank calls
    this: rank 0 copies, and the others wait as long as bytes arrive. After an error nothing is left of the copy.

    Raises:
        CheckpointError: on every rank; the copy in the storage has no manifest, or is not what its manifest says.
        OSError: on every rank; the storage or the local disk failed.
    """
    final = step_path(directory, step)
    copy = writing_path(final)
    try:
        files = on_main_rank(partial(_begin_copy, remote, step, copy))
        on_main_rank(together(partial(_fetch_files, remote, step, files, copy)))
        _verify_copy(copy)
        on_main_rank(partial(_keep_copy, copy, final))
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(copy, ignore_errors=True)
        raise


def _fetch_files(remote: RemoteCheckpoints, step: int, files: dict[str, int], copy: Path) -> None:
    """Copy the files on rank 0. The other ranks have nothing to do."""
    if dist.get_rank() == 0:
        for name, num_bytes in files.items():
            remote.fetch_file(step, name, num_bytes, copy)


def _begin_copy(remote: RemoteCheckpoints, step: int, copy: Path) -> dict[str, int]:
    """Make the copy's directory with the manifest in it, and return the sizes of the files that the manifest names."""
    manifest = remote.manifest(step)
    files: dict[str, dict[str, Any]] = manifest["files"]
    needed, free = sum(entry["size"] for entry in files.values()), shutil.disk_usage(copy.parent).free
    if needed > free:
        # Check the sizes before asking for a larger disk: the manifest may be wrong.
        remote.require_sizes(step, files)
        sizes = f"{needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free"
        raise OSError(f"the copy of step {step} in {remote.url} does not fit into {copy.parent}: it has {sizes}. Make room for it")
    logger.info("fetching the checkpoint of step %d from %s", step, remote.url)
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    # The manifest that was checked is written. In the storage it may have changed since then.
    write_text(copy / MANIFEST, json.dumps(manifest, indent=1))
    return {name: entry["size"] for name, entry in files.items()}


def _verify_copy(copy: Path) -> None:
    """Raise CheckpointError on every rank if files differ from the manifest."""
    try:
        verify_checkpoint(copy, rank=dist.get_rank(), num_ranks=dist.get_world_size())
        on_main_rank(partial(require_position, copy))
    except DamagedCheckpointError as error:
        # The message leaves out the advice for a checkpoint of the run's directory, because the copy is removed.
        raise agreed(CheckpointError(error.reason)) from error


def _keep_copy(copy: Path, final: Path) -> None:
    for path in step_paths(final.parent):
        logger.warning("%s is damaged and is now %s; a copy takes its place", path, set_aside(path, DAMAGED).name)
    copy.rename(final)
    sync_directory(final.parent)


def _require_none_sent(url: str, contents: Contents, *, is_unfinished: bool) -> None:
    """Refuse to begin at step 0 if the run has, or may have, uploaded checkpoints, and no good copy is left.

    Args:
        is_unfinished: True if the storage has only uploads that did not end.

    Raises:
        CheckpointError: checkpoints were uploaded, or it is not known whether they were.
    """
    marker, steps = contents.marker, ", ".join(map(str, contents.steps))
    if contents.marker_problem is not None:
        why = contents.marker_problem
    elif marker is not None and marker.newest is not None:
        why = f"its {MARKER} says that the checkpoint of step {marker.newest} was uploaded"
    elif contents.steps and not (marker is not None and is_unfinished):
        why = f"it shows directories of step {steps}"
    else:
        if marker is None:
            logger.info(
                "%s has no checkpoint and no %s: this is the first start that uploads checkpoints to it, or the URL is wrong", url, MARKER
            )
        else:
            logger.warning(
                "%s has no checkpoint, and its %s says that no checkpoint was uploaded: the run ended before its first upload ended",
                url,
                MARKER,
            )
        return
    raise CheckpointError(
        f"{url} has no good checkpoint, but {why}. Check that the URL is right and that the storage lists all its files, or restore a copy "
        f"of a checkpoint. To begin again at step 0, move its files away, {MARKER} too, or choose another checkpoint.upload"
    )


def _require_none_lost(directory: Path, events: Path | None) -> None:
    """Refuse to begin at step 0 if the run has had checkpoints.

    Raises:
        CheckpointError: there are damaged checkpoints, or the events record saves of checkpoints that are missing.
    """
    damaged = sorted([*step_paths(directory), *damaged_paths(directory)])
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise CheckpointError(
            f"{directory} has no good checkpoint, only damaged checkpoints: {names}. Restore a copy of one of them, or move them away to "
            "begin again at step 0"
        )
    saved = _saved_steps(events) if events is not None and events.exists() else []
    if saved:
        raise CheckpointError(
            f"{directory} has no checkpoint, but {events} says that this run has saved checkpoints, the last at step {saved[-1]}. Restore "
            "a copy of one of them. To begin again at step 0, choose another name=..., or move away the run directory or its events.jsonl"
        )


def _saved_steps(events: Path) -> list[int]:
    """Return the steps of the checkpoints that were saved since the run last began at step 0."""
    saved: list[int] = []
    for event in read_metrics(events):
        if event.get("event") == "start":
            saved = []
        elif event.get("event") == "checkpoint":
            saved.append(event["step"])
    return saved
