"""Writing of a checkpoint's shards: one file for each rank, hashed while it is written, and the index of all tensors.

Nothing here communicates with other ranks. A rank writes a note about its part beside its file, and rank 0 joins the notes when all ranks
have written theirs.
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
from w1train.config.errors import first_line
from w1train.config.reading import parse_json_object
from w1train.runtime.files import open_new, write_text
from w1train.runtime.pulse import pulse
from w1train.runtime.transfers import PIECE_BYTES, PiecewiseFile

FREE_BYTES = "free_bytes"
"""The attribute of an OSError with the bytes that were free on the disk when a file could not be written."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _HashedFile:
    """A file that is written from beginning to end, and the hash of the bytes that were written. If the disk stores other bytes, the
    verification before a load finds it."""

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


def write_part(directory: Path, rank: int, boxes: Sequence[Box], tensors: Sequence[Tensor], values: dict[str, Any]) -> None:
    """Write a rank's shards into ``directory`` and wait until they are on the disk. After a failure the file is removed, so that other
    writers of a full disk have space.

    Args:
        tensors: the elements of the boxes; on any device, with any strides.
        values: plain values that this rank adds to the index.

    Raises:
        OSError: the shards could not be written. The attribute ``FREE_BYTES`` has the bytes that were free before the removal.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, note = shard_path(directory, rank), _note(directory, rank)
    try:
        with open_new(path) as file, pulse.transferring(f"writing {path}"):
            stream = _HashedFile(file)
            index = ShardIndex(write_boxes(stream, path.name, boxes, tensors), values)
            stream.sync()
            entry = {"size": file.tell(), "sha256": stream.hexdigest()}
        _leave_note(note, {path.name: entry}, index)
    except OSError as error:
        error.__dict__[FREE_BYTES] = shutil.disk_usage(directory).free if directory.exists() else 0
        with contextlib.suppress(OSError):  # the first error is the one to report; the next start removes the rest
            path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        raise


def shard_path(directory: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return directory / f"rank_{rank:05d}.shards"


def _leave_note(path: Path, files: dict[str, Any], index: ShardIndex) -> None:
    write_text(path, json.dumps({"files": files, "index": index.as_json()}))


def write_boxes(stream: _HashedFile, name: str, boxes: Sequence[Box], tensors: Sequence[Tensor]) -> dict[str, StoredTensor]:
    """Write the elements of boxes one after another, and return the index of the tensors."""
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
    """Join the notes of all ranks into the index, and remove them. Only rank 0 calls this, when all ranks have written their notes.

    Returns:
        The manifest's entries of the ranks' files.

    Raises:
        OSError: a note cannot be read, or the index cannot be written.
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
    """Describe an error in one line, without the traceback that torch puts into its text."""
    text = first_line(error)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"a file could not be written to its end (disk full, or a quota or file size limit reached: {text})"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
