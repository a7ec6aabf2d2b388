"""The renames by which written files become a checkpoint, after their manifest, and by which a checkpoint stops to be a checkpoint.

A process that is killed at any moment leaves either a complete checkpoint or a directory with another name (checkpoint_names.py).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from w1train.checkpoints.checkpoint_names import UNDONE, removing_path, set_aside_path, unfinished_paths, writing_path
from w1train.checkpoints.format.shard_files import FREE_BYTES, describe_write_error, shard_path
from w1train.checkpoints.manifest import CONFIG, MANIFEST, CheckpointError, Progress, latest_step
from w1train.checkpoints.verification import hash_files
from w1train.runtime.distributed import agreed, on_every_rank, on_main_rank
from w1train.runtime.files import sync_directory, write_text
from w1train.runtime.transfers import together

logger = logging.getLogger(__name__)


def write_complete(
    final: Path, write_shards: Callable[[Path], object], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]
) -> None:
    """Write a checkpoint, and wait until it is complete. Every rank calls this.

    Args:
        write_shards: writes this rank's file and, on rank 0, the index into the directory that it is given.
        remarks: further entries of the manifest.

    Raises:
        CheckpointError: on every rank if any rank failed to write; nothing is left of the checkpoint.
    """
    writing = writing_path(final)
    try:
        on_main_rank(partial(_make_empty, writing))
        write_shards(writing)
        files = dict(ChainMap(*on_every_rank(together(lambda: hash_files([shard_path(writing, dist.get_rank())])))))
        on_main_rank(lambda: finish(final, files, progress, config_yaml, remarks))
    except (OSError, CheckpointException) as error:
        raise agreed(CheckpointError(on_main_rank(partial(explain_failure, final, error)))) from error


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def finish(final: Path, files: Mapping[str, Any], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]) -> None:
    """Make a checkpoint of what all ranks have written at ``writing_path(final)``. Only rank 0 calls this.

    Args:
        files: the manifest's entries of the ranks' files.
        remarks: further entries of the manifest.

    Raises:
        OSError: the checkpoint was not made.
    """
    writing = writing_path(final)
    _write_manifest(writing, files, progress, config_yaml, remarks)
    _commit(writing, final)


def _write_manifest(writing: Path, files: Mapping[str, Any], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]) -> None:
    write_text(writing / CONFIG, config_yaml)
    others = hash_files(path for path in writing.iterdir() if path.name not in files)
    manifest = {**asdict(progress), "world_size": dist.get_world_size(), **remarks, "files": {**files, **others}}
    write_text(writing / MANIFEST, json.dumps(manifest, indent=1))


def _commit(writing: Path, final: Path) -> None:
    if final.exists():
        # A rename does not replace a directory. This checkpoint is of a step that is trained again, and was not renamed before.
        logger.warning("%s was there already and is now %s", final, set_aside(final, UNDONE).name)
    os.rename(writing, final)
    sync_directory(final.parent)


def set_aside(path: Path, prefix: str) -> Path:
    """Rename a checkpoint, so that nothing resumes from it or removes it, and return its new path.

    Args:
        prefix: begins the new name: ``checkpoint_names.DAMAGED`` or ``UNDONE``.
    """
    target = set_aside_path(path, prefix)
    os.rename(path, target)
    sync_directory(path.parent)
    return target


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint. It is renamed first: a directory that is half removed must not look complete.

    Raises:
        OSError: it could not be removed.
    """
    hidden = removing_path(path)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed process was writing or removing. Only rank 0 calls this, while it holds the run's lock."""
    for path in unfinished_paths(directory):
        logger.info("removing unfinished checkpoint %s", path)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def raise_together(error: OSError | None) -> None:
    """Raise on all ranks the errors that some of them met. Every rank calls this, with its own error or None.

    Raises:
        CheckpointException: on every rank if any rank met an error; it holds the errors by rank.
    """
    errors: list[OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failures = {rank: (error, None) for rank, error in enumerate(errors) if error is not None}
    if failures:
        raise CheckpointException("save", failures)


def explain_failure(final: Path, error: BaseException) -> str:
    """Remove the half-written files, because they may be the reason why the disk is full, and describe what failed and what is left. Only
    rank 0 calls this."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    free = min(shutil.disk_usage(final.parent).free, *(getattr(cause, FREE_BYTES, math.inf) for cause in causes))
    shutil.rmtree(writing_path(final), ignore_errors=True)
    kept = latest_step(final.parent)
    older = (
        "There is no older checkpoint" if kept is None else f"The checkpoint of step {kept} is untouched: the same command resumes from it"
    )
    return f"could not save {final}, with {free / 2**20:.1f} MiB free on that disk: {'; '.join(_root_causes(error))}. {older}."


def _root_causes(error: BaseException) -> list[str]:
    """Describe each rank's failure in one line."""
    if isinstance(error, CheckpointException):
        return [f"rank {rank}: {describe_write_error(cause)}" for rank, (cause, _) in sorted(error.failures.items())]
    return [describe_write_error(error)]
