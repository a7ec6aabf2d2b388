"""The shards of a checkpoint by key and box, without a model: the one way to read what a checkpoint holds.

Nothing but the shard in hand is in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w1train.checkpoints.format.legacy_index import Place, read_tensor
from w1train.checkpoints.format.plain_values import decode
from w1train.checkpoints.format.shard_index import Shard, StoredTensor, read_index
from w1train.checkpoints.manifest import DamagedCheckpointError, read_manifest
from w1train.config.reading import shorten
from w1train.runtime.names import open_inside
from w1train.runtime.pulse import moved
from w1train.runtime.transfers import PIECE_BYTES


class Shards:
    """A complete checkpoint's shards, to be read."""

    def __init__(self, path: Path) -> None:
        """Read the index. The caller has verified the files (``verify_checkpoint``).

        Raises:
            CheckpointError: the index or the manifest is missing or damaged, or they do not fit together.
        """
        self.path = path
        self.index = read_index(path)
        self._require_files()

    def _require_files(self) -> None:
        """Compare what the index claims with the manifest's sizes of files, which the ranks have compared with the files together, before
        anybody takes memory or time for what the index claims."""
        files, num_bytes_in = read_manifest(self.path)["files"], Counter[str]()
        for key, tensor in self.tensors.items():
            for shard in tensor.shards:
                num_bytes = tensor.num_bytes(shard)
                if shard.archive_bytes is not None and num_bytes > shard.archive_bytes:
                    raise DamagedCheckpointError(
                        self.path, [f"{shorten(key)} has {num_bytes} bytes in an archive of {shard.archive_bytes}"]
                    )
                if shard.file not in files:
                    raise DamagedCheckpointError(self.path, [f"{shorten(key)} is in {shard.file}, which the manifest does not name"])
                num_bytes_in[shard.file] += shard.archive_bytes or num_bytes
                # The sum: boxes that share their bytes would let a small file be a tensor of any size.
                if max(shard.start + (shard.archive_bytes or num_bytes), num_bytes_in[shard.file]) > files[shard.file]["size"]:
                    raise DamagedCheckpointError(self.path, [f"{shorten(key)} ends behind the end of {shard.file}"])

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Tensors by key."""
        return self.index.tensors

    def values(self) -> dict[str, Any]:
        """Return a copy of the plain values that are stored beside the tensors."""
        return decode(self.index.values)

    def read(self, key: str, shard: Shard) -> Tensor:
        """Read one shard; on the CPU.

        Raises:
            CheckpointError: its file is missing, too short or cannot be read, or is a link.
        """
        tensor = self.tensors[key]
        try:
            if shard.archive_bytes is not None:
                place = Place(shard.file, shard.start, shard.archive_bytes)
                return read_tensor(self.path, place, tensor.dtype, shard.sizes)
            return _read_elements(self.path, tensor, shard)
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(self.path, [f"{shorten(key)} in {shard.file} cannot be read: {error}"]) from error

    def read_into(self, target: Tensor, key: str, offset: Sequence[int], combine: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> int:
        """Call ``combine(part of target, what is stored there)`` for each shard that overlaps a box, whatever layout saved it.

        Args:
            target: as large as the box; on any device.
            offset: where the box begins in the stored tensor.

        Returns:
            The number of elements of ``target`` that are stored: fewer than it has if the box reaches beyond the stored tensor.

        Raises:
            CheckpointError: as ``read`` does.
        """
        num_read = 0
        for shard in self.tensors[key].shards:
            low = [max(a, b) for a, b in zip(offset, shard.offset, strict=True)]
            high = [min(a, b) for a, b in zip(_ends(offset, target.shape), _ends(shard.offset, shard.sizes), strict=True)]
            if any(start >= end for start, end in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, offset, strict=True))
            here = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, shard.offset, strict=True))
            num_read += target[there].numel()
            # No name for what is loaded: it would keep this shard while the next one is read.
            combine(target[there], self.read(key, shard)[here])
        return num_read


def _read_elements(directory: Path, tensor: StoredTensor, shard: Shard) -> Tensor:
    num_bytes = tensor.num_bytes(shard)
    with open_inside(directory, shard.file) as file:
        target = torch.empty(shard.sizes, dtype=tensor.dtype)
        elements = memoryview(target.view(-1).view(torch.uint8).numpy())
        file.seek(shard.start)
        for start in range(0, num_bytes, PIECE_BYTES):
            piece = elements[start : start + PIECE_BYTES]
            if file.readinto(piece) != len(piece):
                raise ValueError("the file ended while it was read")
            moved()
    return target


def _ends(offset: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return [start + size for start, size in zip(offset, sizes, strict=True)]
