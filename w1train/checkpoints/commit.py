"""How files become a checkpoint: written aside, a manifest, one rename; or nothing is left of them."""

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

from w1train.checkpoints.format.shard_files import FREE_BYTES, describe_write_error, shard_path
from w1train.checkpoints.manifest import MANIFEST, WRITING, CheckpointError, Progress, hash_files, latest_step
from w1train.runtime.distributed import agreed, on_every_rank, on_main_rank
from w1train.runtime.files import sync_directory, write_text
from w1train.runtime.transfers import together

logger = logging.getLogger(__name__)

DAMAGED = "damaged-"
UNDONE = "undone-"
"""Begin the names of what was set aside."""

WriteShards = Callable[[Path], Mapping[str, Any]]
"""Writes shards and their index into the directory it is given, and returns the manifest's entries of them (on rank 0)."""


def write_complete(
    final: Path, write_shards: Callable[[Path], object], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]
) -> None:
    """``write_hashed`` for files that are not hashed yet; each rank has written the one of its number."""

    def write(writing: Path) -> Mapping[str, Any]:
        write_shards(writing)
        return _hash_shards(writing)

    write_hashed(final, write, progress, config_yaml, remarks)


def write_hashed(final: Path, write_shards: WriteShards, progress: Progress, config_yaml: str, remarks: Mapping[str, Any]) -> None:
    """What makes shards a checkpoint: written aside, a manifest (with ``remarks`` added), one rename. Called on every rank.

    Raises:
        CheckpointError: on every rank if any failed to write; nothing is left of it.
    """
    try:
        on_main_rank(partial(_make_empty, writing_path(final)))
        files = write_shards(writing_path(final))
        on_main_rank(lambda: finish(final, files, progress, config_yaml, remarks))
    except (OSError, CheckpointException) as error:
        raise agreed(CheckpointError(on_main_rank(partial(explain_failure, final, error)))) from error


def _hash_shards(writing: Path) -> dict[str, Any]:
    parts = on_every_rank(together(lambda: hash_files([shard_path(writing, dist.get_rank())])))
    return dict(ChainMap(*parts))


def writing_path(final: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return final.parent / f"{WRITING}{final.name}"


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def finish(final: Path, files: Mapping[str, Any], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]) -> None:
    """Make visible what all ranks have written. Rank 0 only.

    Args:
        files: the manifest's entries of the ranks' files.

    Raises:
        OSError: the checkpoint is not there.
    """
    writing = writing_path(final)
    _write_manifest(writing, files, progress, config_yaml, remarks)
    _commit(writing, final)


def _write_manifest(writing: Path, files: Mapping[str, Any], progress: Progress, config_yaml: str, remarks: Mapping[str, Any]) -> None:
    write_text(writing / "config.yaml", config_yaml)
    others = hash_files(path for path in writing.iterdir() if path.name not in files)
    manifest = {**asdict(progress), "world_size": dist.get_world_size(), **remarks, "files": {**files, **others}}
    write_text(writing / MANIFEST, json.dumps(manifest, indent=1))


def _commit(writing: Path, final: Path) -> None:
    if final.exists():
        # Of steps that were undone without a word to whoever keeps checkpoints; a rename does not replace a directory.
        logger.warning("%s was there already and is now %s", final, set_aside(final, UNDONE).name)
    os.rename(writing, final)
    sync_directory(final.parent)


def set_aside(path: Path, prefix: str) -> Path:
    """Rename a checkpoint, so that nothing takes it for one, and nothing removes it. Returns its new path."""
    target, number = path.with_name(f"{prefix}{path.name}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{prefix}{path.name}.{number}")
    os.rename(path, target)
    sync_directory(path.parent)
    return target


def raise_together(error: OSError | None) -> None:
    """Tell all ranks of the error that this one met, if any. Called on every rank.

    Raises:
        CheckpointException: on every rank if any met one; with what went wrong by rank.
    """
    errors: list[OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failures = {rank: (error, None) for rank, error in enumerate(errors) if error is not None}
    if failures:
        raise CheckpointException("save", failures)


def explain_failure(final: Path, error: BaseException) -> str:
    """What went wrong and what is left, once the half-written files (which may be what fills the disk) are gone. Rank 0 only."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    free = min(shutil.disk_usage(final.parent).free, *(getattr(cause, FREE_BYTES, math.inf) for cause in causes))
    shutil.rmtree(writing_path(final), ignore_errors=True)
    kept = latest_step(final.parent)
    older = "There is no older one" if kept is None else f"The one of step {kept} is untouched: the same command goes on from it"
    return f"could not save {final}, with {free / 2**20:.1f} MiB free on that disk: {'; '.join(_root_causes(error))}. {older}."


def _root_causes(error: BaseException) -> list[str]:
    """One line for every rank that failed."""
    if isinstance(error, CheckpointException):
        return [f"rank {rank}: {describe_write_error(cause)}" for rank, (cause, _) in sorted(error.failures.items())]
    return [describe_write_error(error)]
