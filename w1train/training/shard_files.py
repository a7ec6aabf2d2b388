"""The files of a checkpoint's shards: one for each rank, hashed on the way to the disk, and the metadata that says where everything is.

The format is torch's distributed checkpoint's (torch.distributed.checkpoint.FileSystemReader reads it): a shard is a piece of a file that
``torch.load`` understands. Nothing here talks to other ranks: a rank leaves a note of its part beside its file, and rank 0 reads the notes
when all ranks have said that they are done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.filesystem import _StorageInfo as Place
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from w1train.runtime.files import replace_file, write_text
from w1train.runtime.pulse import pulse
from w1train.runtime.transfers import PiecewiseFile
from w1train.training.shard_plan import Box, Entries

METADATA = ".metadata"
FREE_BYTES = "free_bytes"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _HashedFile:
    """A file that is written from beginning to end, with the hash of what was handed to it: what the disk makes of it is for the load to
    find out."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = PiecewiseFile(file), hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        # torch's archive writer, called back into from C++, forgets why a write failed.
        try:
            self._hash.update(data)
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        self._file.sync()

    def tell(self) -> int:
        return self._file.tell()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_part(directory: Path, rank: int, boxes: Sequence[Box], tensors: Sequence[Tensor], objects: dict[str, bytes]) -> int:
    """Write a rank's shards into ``directory`` and wait until they are on the disk; on failure what was written is removed, to free the
    space for what else writes there.

    Args:
        tensors: of the boxes; on any device, of any strides.

    Returns:
        Bytes written.

    Raises:
        OSError: with what the operating system says; its ``FREE_BYTES`` are what the disk had left before the removal.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, note = directory / f"__{rank}_0.distcp", _note(directory, rank)
    try:
        with path.open("wb") as file, pulse.transferring(f"writing {path}"):
            stream = _HashedFile(file)
            with _as_os_error(stream):
                places = list(_write_shards(stream, path.name, boxes, tensors, objects))
            stream.sync()
            size = file.tell()
        _leave_note(note, {path.name: {"size": size, "sha256": stream.hexdigest()}}, places)
    except OSError as error:
        error.__dict__[FREE_BYTES] = shutil.disk_usage(directory).free if directory.exists() else 0
        with contextlib.suppress(OSError):  # the first error is the one to tell; the next start removes the rest
            path.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        raise
    return size


def _leave_note(path: Path, files: dict[str, Any], places: Sequence[tuple[Any, ...]]) -> None:
    write_text(path, json.dumps({"files": files, "places": places}))


def _write_shards(
    stream: _HashedFile, name: str, boxes: Sequence[Box], tensors: Sequence[Tensor], objects: dict[str, bytes]
) -> Iterator[tuple[Any, ...]]:
    """(key, offset, file, start, length) of each shard."""
    for key, content in objects.items():
        start = stream.tell()
        stream.write(content)
        yield key, None, name, start, stream.tell() - start
    for box, tensor in zip(boxes, tensors, strict=True):
        start = stream.tell()
        torch.save(_alone(tensor), cast(BinaryIO, stream))
        yield box.key, box.offset, name, start, stream.tell() - start


def _alone(tensor: Tensor) -> Tensor:
    """On the host, in memory that holds nothing else: torch.save writes all of the memory that a tensor is a view of."""
    host = tensor.detach().cpu()
    is_alone = host.is_contiguous() and host.untyped_storage().nbytes() == host.numel() * host.itemsize
    return host if is_alone else host.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _as_os_error(stream: _HashedFile) -> Iterator[None]:
    """The error of a write, whatever torch has made of it."""
    try:
        yield
    except RuntimeError:
        if stream.error is None:
            raise
    if stream.error is not None:
        raise stream.error


def write_metadata(directory: Path, entries: Entries, num_ranks: int) -> dict[str, Any]:
    """Put the notes of all ranks together. Rank 0 only, when all are written.

    Returns:
        The manifest's entries of the ranks' files.

    Raises:
        OSError: a note cannot be read, or the metadata not be written.
    """
    files: dict[str, Any] = {}
    places: dict[MetadataIndex, Place] = {}
    notes = [_note(directory, rank) for rank in range(num_ranks)]
    for path in notes:
        note = json.loads(path.read_bytes())
        files.update(note["files"])
        for key, offset, name, start, length in note["places"]:
            places[MetadataIndex(key, None if offset is None else torch.Size(offset))] = Place(name, start, length)
    metadata = Metadata(entries, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    with replace_file(directory / METADATA) as file:
        pickle.dump(metadata, file)
    for path in notes:
        path.unlink()
    return files


def _note(directory: Path, rank: int) -> Path:
    return directory / f"part_{rank:05d}.json"


def describe_error(error: BaseException) -> str:
    """One line, without the tracebacks that torch puts into its text."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"a file could not be written to its end (disk full, or a quota or file size limit reached: {text})"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
