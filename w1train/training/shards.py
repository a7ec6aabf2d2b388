"""The files of a torch distributed checkpoint by key and shard, without a model: for what is done with checkpoints alone.

A key is a whole tensor of the model, under its global name (all layers of a pipeline stacked); a shard is one box of it, as one rank
saved it, and its place a file, an offset and a length. Boxes of one checkpoint do not overlap. Nothing but the shard in hand is in memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo as Place
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

_COPY_CHUNK = 1 << 24
_METADATA = ".metadata"


class Shards:
    """A complete checkpoint's shards, to be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = FileSystemReader(path).read_metadata()
        self.places: dict[MetadataIndex, Place] = self.metadata.storage_data

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """What is a tensor, by key; the rest is pickled objects."""
        entries = self.metadata.state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def box(self, index: MetadataIndex) -> ChunkStorageMetadata:
        """Where a shard lies in its tensor."""
        entry = self.metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        return next(chunk for chunk in entry.chunks if chunk.offsets == index.offset)

    def read_into(self, target: Tensor, key: str, box: ChunkStorageMetadata, combine: Callable[[Tensor, Tensor], object]) -> None:
        """``combine(part of target, what is stored there)`` for each shard that overlaps a box of a tensor, whatever layout saved it.

        Args:
            target: of the box's sizes.
        """
        num_read = 0
        entry = self.tensors()[key]
        for shard in entry.chunks:
            low = [max(a, b) for a, b in zip(box.offsets, shard.offsets, strict=True)]
            high = [min(a, b) for a, b in zip(_ends(box), _ends(shard), strict=True)]
            if any(start >= end for start, end in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, box.offsets, strict=True))
            here = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, shard.offsets, strict=True))
            num_read += target[there].numel()
            # No name for what is loaded: it would keep this shard while the next one is read.
            combine(target[there], self._load(MetadataIndex(key, shard.offsets))[here])
        assert num_read == target.numel(), f"{self.path} has {num_read} of {target.numel()} elements of {key} at {box.offsets}"

    def _load(self, index: MetadataIndex) -> Tensor:
        place = self.places[index]
        with (self.path / place.relative_path).open("rb") as file:
            view = cast(BinaryIO, _create_file_view(file, place.offset, place.length))
            return torch.load(view, map_location="cpu", weights_only=True)

    def copy(self, index: MetadataIndex, stream: BinaryIO) -> None:
        """Append a shard's bytes to a file, as they are."""
        place = self.places[index]
        with (self.path / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            left = place.length
            while left > 0:
                chunk = file.read(min(left, _COPY_CHUNK))
                assert chunk, f"{self.path / place.relative_path} ends inside {index}"
                stream.write(chunk)
                left -= len(chunk)

    def write_metadata(self, directory: Path, places: Mapping[MetadataIndex, Place]) -> None:
        """Write the metadata of a checkpoint with the same tensors in the same boxes, kept at other places."""
        assert places.keys() == self.places.keys()
        with (directory / _METADATA).open("wb") as file:
            pickle.dump(replace(self.metadata, storage_data=dict(places), storage_meta=None), file)


def _ends(box: ChunkStorageMetadata) -> list[int]:
    return [offset + size for offset, size in zip(box.offsets, box.sizes, strict=True)]
