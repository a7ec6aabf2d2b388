"""The files of a checkpoint's shards: one for each rank, hashed on the way to the disk, and the index that says where everything is.

Nothing here talks to other ranks: a rank leaves a note of its part beside its file, and rank 0 puts the notes together when all ranks have
said that they are done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from w1train.checkpoints.format.shard_index import Shard, ShardIndex, StoredTensor
from w1train.checkpoints.format.shard_plan import Box
from w1train.config.reading import parse_json_object
from w1train.runtime.files import open_new, write_text
from w1train.runtime.pulse import pulse
from w1train.runtime.transfers import PIECE_BYTES, PiecewiseFile

FREE_BYTES = "free_bytes"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _HashedFile:
    """A file that is written from beginning to end, with the hash of what was handed to it: what the disk makes of it is for the load to
    find out."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = PiecewiseFile(file), hashlib.sha256()

    def write(self, data: memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    def sync(self) -> None:
        self._file.sync()

    def tell(self) -> int:
        return self._file.tell()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_part(directory: Path, rank: int, boxes: Sequence[Box], tensors: Sequence[Tensor], values: dict[str, Any]) -> int:
    """Write a rank's shards into ``directory`` and wait until they are on the disk; on failure what was written is removed, to free the
    space for what else writes there.

    Args:
        tensors: of the boxes; on any device, of any strides.
        values: what this rank adds to the index beside tensors.

    Returns:
        Bytes written.

    Raises:
        OSError: with what the operating system says; its ``FREE_BYTES`` are what the disk had left before the removal.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, note = shard_path(directory, rank), _note(directory, rank)
    try:
        with open_new(path) as file, pulse.transferring(f"writing {path}"):
            stream = _HashedFile(file)
            index = ShardIndex(write_boxes(stream, path.name, boxes, tensors), values)
            stream.sync()
            size = file.tell()
        _leave_note(note, {path.name: {"size": size, "sha256": stream.hexdigest()}}, index)
    except OSError as error:
        error.__dict__[FREE_BYTES] = shutil.disk_usage(directory).free if directory.exists() else 0
        with contextlib.suppress(OSError):  # the first error is the one to tell; the next start removes the rest
            path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        raise
    return size


def shard_path(directory: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return directory / f"rank_{rank:05d}.shards"


def _leave_note(path: Path, files: dict[str, Any], index: ShardIndex) -> None:
    write_text(path, json.dumps({"files": files, "index": index.as_json()}))


def write_boxes(stream: _HashedFile, name: str, boxes: Sequence[Box], tensors: Sequence[Tensor]) -> dict[str, StoredTensor]:
    """Write the elements of boxes one after another, and return where they are."""
    stored: dict[str, StoredTensor] = {}
    for box, tensor in zip(boxes, tensors, strict=True):
        before = stored[box.key].shards if box.key in stored else ()
        shard = Shard(box.offset, box.sizes, name, stream.tell())
        stored[box.key] = StoredTensor(box.dtype, box.global_sizes, (*before, shard))
        write_elements(stream, tensor)
    return stored


def write_elements(stream: _HashedFile | PiecewiseFile, tensor: Tensor) -> None:
    """Write a tensor's elements in row-major order, some megabytes at a time."""
    elements = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for start in range(0, len(elements), PIECE_BYTES):
        stream.write(elements[start : start + PIECE_BYTES])


def write_index(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Put the notes of all ranks together. Rank 0 only, when all are written.

    Returns:
        The manifest's entries of the ranks' files.

    Raises:
        OSError: a note cannot be read, or the index not be written.
    """
    paths = [_note(directory, rank) for rank in range(num_ranks)]
    notes = [parse_json_object(path.read_bytes(), f"{path} cannot be read") for path in paths]
    ShardIndex.join(ShardIndex.from_json(note["index"]) for note in notes).write(directory)
    for path in paths:
        path.unlink()
    return {name: entry for note in notes for name, entry in note["files"].items()}


def _note(directory: Path, rank: int) -> Path:
    return directory / f"part_{rank:05d}.json"


def describe_write_error(error: BaseException) -> str:
    """One line, without the tracebacks that torch puts into its text."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"a file could not be written to its end (disk full, or a quota or file size limit reached: {text})"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
