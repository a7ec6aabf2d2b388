"""The reader of a checkpoint's tensors and values, by key and box, without a model. Everything that reads checkpoints uses it.

Only one shard is in memory at a time.
"""

from __future__ import annotations

import math
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
    """The shards of a complete checkpoint."""

    def __init__(self, path: Path) -> None:
        """Read the index. The caller has verified the files (``verify_checkpoint``).

        Raises:
            DamagedCheckpointError: the index or the manifest is missing or damaged, or they do not fit together.
        """
        self.path = path
        self.index = read_index(path)
        self._require_files()

    def _require_files(self) -> None:
        """Compare the index with the sizes of files in the manifest, before memory is allocated for what the index claims. The files were
        compared with the manifest before."""
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
                # Also the sum is compared: boxes that share their bytes would make a small file a tensor of any size.
                if max(shard.start + (shard.archive_bytes or num_bytes), num_bytes_in[shard.file]) > files[shard.file]["size"]:
                    raise DamagedCheckpointError(self.path, [f"{shorten(key)} ends behind the end of {shard.file}"])

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Tensors of the checkpoint by key."""
        return self.index.tensors

    def values(self) -> dict[str, Any]:
        """Return a copy of the plain values that are stored beside the tensors."""
        return decode(self.index.values)

    def read(self, key: str, shard: Shard, box: tuple[slice, ...] | None = None) -> Tensor:
        """Read one shard, or a box of it, into a tensor on the CPU. Of a file, only consecutive rows that hold the box are read.

        Raises:
            DamagedCheckpointError: its file is missing, is too short, cannot be read, or is a link.
        """
        tensor, box = self.tensors[key], box or tuple(slice(0, size) for size in shard.sizes)
        try:
            if shard.archive_bytes is not None:
                place = Place(shard.file, shard.start, shard.archive_bytes)
                return read_tensor(self.path, place, tensor.dtype, shard.sizes)[box]
            return _read_elements(self.path, tensor, shard, box)
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(self.path, [f"{shorten(key)} in {shard.file} cannot be read: {error}"]) from error

    def read_into(self, target: Tensor, key: str, offset: Sequence[int], combine: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> int:
        """Call ``combine(part of target, stored elements of this part)`` for each shard that overlaps a box, whatever layout saved it.

        Args:
            target: a tensor of the box's sizes, on any device.
            offset: the first element of the box in the stored tensor.

        Returns:
            The number of elements of ``target`` that are stored. It is less than all if the box ends beyond the stored tensor.

        Raises:
            DamagedCheckpointError: as ``read`` does.
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
            # The loaded shard has no name here, which would keep it in memory while the next one is read.
            combine(target[there], self.read(key, shard, here))
        return num_read


def _read_elements(directory: Path, tensor: StoredTensor, shard: Shard, box: tuple[slice, ...]) -> Tensor:
    """Read the rows that hold a box, rows of the first dimension of which the box has more than one element, and return the box."""
    num_single = next((dimension for dimension, part in enumerate(box[:-1]) if part.stop - part.start > 1), max(len(box) - 1, 0))
    inner = shard.sizes[num_single + 1 :]
    strides = [math.prod(shard.sizes[dimension + 1 :]) for dimension in range(num_single + 1)]
    first = sum(part.start * stride for part, stride in zip(box, strides, strict=False))
    rows = [part.stop - part.start for part in box[num_single : num_single + 1]]
    with open_inside(directory, shard.file) as file:
        target = torch.empty((*rows, *inner), dtype=tensor.dtype)
        elements = memoryview(target.view(-1).view(torch.uint8).numpy())
        file.seek(shard.start + first * tensor.dtype.itemsize)
        for start in range(0, len(elements), PIECE_BYTES):
            piece = elements[start : start + PIECE_BYTES]
            if file.readinto(piece) != len(piece):
                raise ValueError("the file ended while it was read")
            moved()
    return target[(None,) * num_single + tuple(slice(0, size) for size in rows) + box[num_single + 1 :]]


def _ends(offset: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return [start + size for start, size in zip(offset, sizes, strict=True)]
